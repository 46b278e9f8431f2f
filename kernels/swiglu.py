"""SwiGLU (arXiv 2002.05202): y = silu(gate) up, silu(g) = g sigmoid(g).

    d gate = dy up s (1 + g (1 - s)),  d up = dy g s,  s = sigmoid(g)

Backward computes s again: gate and up, which exist, are all that is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from swift_dist.kernels._triton import Backend, compute_dtype, jit, on_triton, power_of_two, tl, tl_dtype

_BLOCK = 1024


def reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The formula in plain torch, in the tensors' own dtype."""
    return F.silu(gate) * up


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, backend: Backend = "auto") -> torch.Tensor:
    """silu(gate) * up.

    Args:
        gate, up: floating, of one shape and dtype; any strides (halves of one tensor are read where they lie).

    Returns:
        Of the same shape and dtype. (The kernel rounds once, at the end; the reference also rounds silu(gate).)
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype}: should be of one shape and dtype"
        )
    if gate.numel() and on_triton(backend, gate):
        result: torch.Tensor = _SwiGLU.apply(gate, up)
        return result
    return reference(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        shape = gate.shape
        gate, up = _rows(gate), _rows(up)
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        _forward_kernel[_grid(gate)](
            gate, up, out, gate.shape[1], gate.stride(0), up.stride(0),
            WIDE=tl_dtype(compute_dtype(gate)), BLOCK=_block(gate),
        )  # fmt: skip
        ctx.save_for_backward(gate, up)
        return out.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = (torch.empty(gradient.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
        _backward_kernel[_grid(gate)](
            gradient.contiguous(), gate, up, of_gate, of_up, gate.shape[1], gate.stride(0), up.stride(0),
            WIDE=tl_dtype(compute_dtype(gate)), BLOCK=_block(gate),
        )  # fmt: skip
        return of_gate, of_up


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """[rows, width], the last stride 1; a view where that is possible."""
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() else tensor.reshape(1, 1)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _block(rows: torch.Tensor) -> int:
    return min(_BLOCK, power_of_two(rows.shape[1]))


def _grid(rows: torch.Tensor) -> tuple[int, int]:
    return len(rows), -(-rows.shape[1] // _block(rows))


@jit
def _forward_kernel(gate, up, out, width, gate_row, up_row, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    raw = tl.load(gate + row * gate_row + column, mask=inside, other=0.0)
    g = raw.to(WIDE)
    u = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(WIDE)
    tl.store(out + row * width + column, (g / (1.0 + tl.exp(-g)) * u).to(raw.dtype), mask=inside)


@jit
def _backward_kernel(
    gradient, gate, up, of_gate, of_up, width, gate_row, up_row, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    index = row * width + column
    raw = tl.load(gate + row * gate_row + column, mask=inside, other=0.0)
    g = raw.to(WIDE)
    u = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(WIDE)
    dy = tl.load(gradient + index, mask=inside, other=0.0).to(WIDE)
    s = 1.0 / (1.0 + tl.exp(-g))
    tl.store(of_gate + index, (dy * u * s * (1.0 + g * (1.0 - s))).to(raw.dtype), mask=inside)
    tl.store(of_up + index, (dy * g * s).to(raw.dtype), mask=inside)
