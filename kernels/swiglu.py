"""SwiGLU (arXiv 2002.05202): y = silu(gate) up, silu(g) = g sigmoid(g).

    d gate = dy up s (1 + g (1 - s)),  d up = dy g s,  s = sigmoid(g)

Backward computes s again: gate and up, which exist, are all that is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from swift_dist.kernels._triton import Backend, compute_dtype, jit, on_triton, tl, tl_dtype

_BLOCK = 1024


def reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The formula in plain torch, in the tensors' own dtype."""
    return F.silu(gate) * up


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, backend: Backend = "auto") -> torch.Tensor:
    """silu(gate) * up.

    Args:
        gate, up: floating, of one shape and dtype.

    Returns:
        Of the same shape and dtype. (The kernel rounds once, at the end; the reference also rounds silu(gate).)
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype}: should be of one shape and dtype"
        )
    if on_triton(backend, gate):
        result: torch.Tensor = _SwiGLU.apply(gate, up)
        return result
    return reference(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        if gate.numel():
            _forward_kernel[_grid(gate)](gate, up, out, gate.numel(), WIDE=tl_dtype(compute_dtype(gate)), BLOCK=_BLOCK)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        if gate.numel():
            _backward_kernel[_grid(gate)](
                gradient.contiguous(), gate, up, of_gate, of_up, gate.numel(),
                WIDE=tl_dtype(compute_dtype(gate)), BLOCK=_BLOCK,
            )  # fmt: skip
        return of_gate, of_up


def _grid(tensor: torch.Tensor) -> tuple[int]:
    return (-(-tensor.numel() // _BLOCK),)


@jit
def _forward_kernel(gate, up, out, count, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    raw = tl.load(gate + index, mask=inside, other=0.0)
    g = raw.to(WIDE)
    u = tl.load(up + index, mask=inside, other=0.0).to(WIDE)
    tl.store(out + index, (g / (1.0 + tl.exp(-g)) * u).to(raw.dtype), mask=inside)


@jit
def _backward_kernel(gradient, gate, up, of_gate, of_up, count, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    raw = tl.load(gate + index, mask=inside, other=0.0)
    g = raw.to(WIDE)
    u = tl.load(up + index, mask=inside, other=0.0).to(WIDE)
    dy = tl.load(gradient + index, mask=inside, other=0.0).to(WIDE)
    s = 1.0 / (1.0 + tl.exp(-g))
    tl.store(of_gate + index, (dy * u * s * (1.0 + g * (1.0 - s))).to(raw.dtype), mask=inside)
    tl.store(of_up + index, (dy * g * s).to(raw.dtype), mask=inside)
