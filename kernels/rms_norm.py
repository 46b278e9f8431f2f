"""RMSNorm (arXiv 1910.07467).

    y = x r w',  r = 1 / sqrt(mean(x^2) + eps),  w' = w + offset
    dx = r (h - x r mean(h x r)) with h = dy w',  dw = sum over rows of dy x r

`offset` is 1 in Gemma, whose weights are stored less one. ``rounds_before_weight`` says where a half-precision model
rounds: llama's rounds x r before it multiplies by the weight, so that float32 weights give a float32 result; Gemma's
rounds afterwards, to x's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from swift_dist.kernels._triton import Backend, compute_dtype, jit, on_triton, power_of_two, tl, tl_dtype, warps_for


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    rounds_before_weight: bool = True,
) -> torch.Tensor:
    """The formula in plain torch, differentiated by autograd."""
    wide = x.to(compute_dtype(x))
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if rounds_before_weight:
        return (weight + offset) * normalized.to(x.dtype)
    return (normalized * (weight.to(wide.dtype) + offset)).to(x.dtype)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    rounds_before_weight: bool = True,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Normalise the last dimension.

    Args:
        x: floating [..., H].
        weight: floating [H].
        eps: added to the mean square.
        offset: added to the weight.
        rounds_before_weight: see above; no difference in float32.

    Returns:
        [..., H] of x's dtype; with ``rounds_before_weight`` of the wider of x's and the weight's.
    """
    if x.shape[-1:] != weight.shape:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit together")
    if on_triton(backend, x):
        result: torch.Tensor = _RMSNorm.apply(x, weight, eps, offset, rounds_before_weight)
        return result
    return reference(x, weight, eps, offset=offset, rounds_before_weight=rounds_before_weight)


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number a row."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, rounds: bool
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out = torch.empty_like(rows, dtype=torch.promote_types(x.dtype, weight.dtype) if rounds else x.dtype)
        weight = weight.contiguous()
        scales = torch.empty(len(rows), dtype=compute_dtype(x), device=x.device)
        block = power_of_two(rows.shape[1])
        if len(rows):
            _forward_kernel[(len(rows),)](
                rows, weight, out, scales, rows.shape[1], eps, offset,
                ROUNDS=rounds, WIDE=tl_dtype(scales.dtype), BLOCK=block, num_warps=warps_for(block),
            )  # fmt: skip
        ctx.save_for_backward(rows, weight, scales)
        ctx.offset, ctx.shape, ctx.block, ctx.rounds = offset, x.shape, block, rounds
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        rows, weight, scales = ctx.saved_tensors
        gradient = gradient.reshape(rows.shape).contiguous()
        result = torch.empty_like(rows)
        programs = min(len(rows), _programs(rows.device))
        parts = torch.zeros(max(programs, 1), rows.shape[1], dtype=scales.dtype, device=rows.device)
        if programs:
            _backward_kernel[(programs,)](
                gradient, rows, weight, scales, result, parts, len(rows), rows.shape[1], ctx.offset,
                ROUNDS=ctx.rounds, WIDE=tl_dtype(scales.dtype), BLOCK=ctx.block, num_warps=warps_for(ctx.block),
            )  # fmt: skip
        return result.view(ctx.shape), parts.sum(0).to(weight.dtype), None, None, None


def _programs(device: torch.device) -> int:
    """One a multiprocessor: each sums its rows' part of the weight's gradient, and the parts are summed afterwards."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@jit
def _forward_kernel(
    x, weight, out, scales, width, eps, offset,
    ROUNDS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    raw = tl.load(x + row * width + column, mask=inside, other=0.0)
    value = raw.to(WIDE)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + eps)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(WIDE) + offset
    normalized = value * scale
    if ROUNDS:
        normalized = normalized.to(raw.dtype).to(WIDE)
    tl.store(out + row * width + column, (normalized * factor).to(out.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


@jit
def _backward_kernel(
    gradient, x, weight, scales, result, parts, rows, width, offset,
    ROUNDS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    factor = tl.load(weight + column, mask=inside, other=0.0).to(WIDE) + offset
    of_weight = tl.zeros((BLOCK,), dtype=WIDE)
    for index in range(program, rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        raw = tl.load(x + row * width + column, mask=inside, other=0.0)
        dy = tl.load(gradient + row * width + column, mask=inside, other=0.0).to(WIDE)
        scale = tl.load(scales + row)
        normalized = raw.to(WIDE) * scale
        rounded = normalized
        if ROUNDS:
            rounded = normalized.to(raw.dtype).to(WIDE)
        of_weight += dy * rounded
        h = dy * factor
        dx = scale * (h - normalized * (tl.sum(h * normalized, 0) / width))
        tl.store(result + row * width + column, dx.to(raw.dtype), mask=inside)
    tl.store(parts + program * width + column, of_weight, mask=inside)
