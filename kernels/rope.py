"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the halves that GPT-NeoX and llama take.

    y = x cos + rotate_half(x) sin,  rotate_half([a, b]) = [-b, a]

A rotation: backward is the same with -sin (of the first half's angles and the second's, which are equal).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from swift_dist.kernels._triton import Backend, compute_dtype, jit, on_triton, power_of_two, tl, tl_dtype


def reference(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula in plain torch, in the tensors' own dtype."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return query * cos + _rotate_half(query) * sin, key * cos + _rotate_half(key) * sin


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rope(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backend: Backend = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys.

    Args:
        query: floating [B, heads, T, d], of any strides whose last is 1.
        key: floating [B, key-value heads, T, d].
        cos, sin: [B or 1, T, d], both halves of the last dimension alike; no gradient flows into them.

    Returns:
        The rotated pair, of the same shapes and dtype.
    """
    if query.shape[-1] % 2 or query.shape[-1] != cos.shape[-1] or query.shape[2] != cos.shape[1]:
        raise ValueError(f"query {tuple(query.shape)} and cos {tuple(cos.shape)} do not fit together")
    if on_triton(backend, query):
        return _Rope.apply(query, cos, sin), _Rope.apply(key, cos, sin)
    return reference(query, key, cos, sin)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, sin, -1.0), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    batch, heads, length, width = x.shape
    # the layout of what comes out of a projection: a token's heads lie side by side
    out = torch.empty((batch, length, heads, width), dtype=x.dtype, device=x.device).transpose(1, 2)
    if x.numel():
        _kernel[(batch * length,)](
            x, out, cos, sin, sign, heads, length, width // 2,
            x.stride(0), x.stride(1), x.stride(2), out.stride(0), out.stride(1), out.stride(2),
            cos.stride(0) if len(cos) > 1 else 0, sin.stride(0) if len(sin) > 1 else 0,
            WIDE=tl_dtype(compute_dtype(x)), HEADS=power_of_two(heads), HALF=power_of_two(width // 2),
        )  # fmt: skip
    return out


@jit
def _kernel(
    x, out, cos, sin, sign, heads, length, half,
    x_batch, x_head, x_token, out_batch, out_head, out_token, cos_batch, sin_batch,
    WIDE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    batch = (program // length).to(tl.int64)
    token = (program % length).to(tl.int64)
    column = tl.arange(0, HALF)
    c = tl.load(cos + batch * cos_batch + token * 2 * half + column, mask=column < half, other=0.0).to(WIDE)[None, :]
    s = tl.load(sin + batch * sin_batch + token * 2 * half + column, mask=column < half, other=0.0).to(WIDE)[None, :]
    s = s * sign
    head = tl.arange(0, HEADS)[:, None]
    inside = (head < heads) & (column < half)[None, :]
    source = x + batch * x_batch + token * x_token + head * x_head + column[None, :]
    target = out + batch * out_batch + token * out_token + head * out_head + column[None, :]
    raw = tl.load(source, mask=inside, other=0.0)
    first, second = raw.to(WIDE), tl.load(source + half, mask=inside, other=0.0).to(WIDE)
    tl.store(target, (first * c - second * s).to(raw.dtype), mask=inside)
    tl.store(target + half, (second * c + first * s).to(raw.dtype), mask=inside)
