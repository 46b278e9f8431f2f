"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the halves that GPT-NeoX and llama take.

    y = x cos + rotate_half(x) sin,  rotate_half([a, b]) = [-b, a]

The halves of cos and sin need not be alike. Of x = [a, b]:

    y = [a cos_a - b sin_a, b cos_b + a sin_b],  dx = [da cos_a + db sin_b, db cos_b - da sin_a]
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from swift_dist.kernels._triton import Backend, compute_dtype, jit, on_triton, power_of_two, tl, tl_dtype


def reference(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula in plain torch, in the wider of the tensors' own dtypes."""
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
        cos, sin: [B or 1, T, d]; no gradient flows into them.

    Returns:
        The rotated pair, of the same shapes and the wider of the tensors' and cos' dtypes. (The kernel rounds once, at
        the end; the reference also rounds products.)
    """
    for x in (query, key):
        angles = {(batch, x.shape[2], x.shape[3]) for batch in (1, x.shape[0])} if x.dim() == 4 else set()
        if not {tuple(cos.shape), tuple(sin.shape)} <= angles or x.shape[-1] % 2 or cos.shape != sin.shape:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, cos, sin))
            raise ValueError(f"query, key, cos and sin {shapes} do not fit together")
    if on_triton(backend, query):
        return _Rope.apply(query, cos, sin), _Rope.apply(key, cos, sin)
    return reference(query, key, cos, sin)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _rotated(x, cos, sin, torch.promote_types(x.dtype, cos.dtype), is_backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, sin, ctx.dtype, is_backward=True), None, None


def _rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype, *, is_backward: bool
) -> torch.Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    batch, heads, length, width = x.shape
    # the layout of what comes out of a projection: a token's heads lie side by side
    out = torch.empty((batch, length, heads, width), dtype=dtype, device=x.device).transpose(1, 2)
    if x.numel():
        _kernel[(batch * length,)](
            x, out, cos, sin, heads, length, width // 2,
            x.stride(0), x.stride(1), x.stride(2), out.stride(0), out.stride(1), out.stride(2),
            cos.stride(0) if len(cos) > 1 else 0, sin.stride(0) if len(sin) > 1 else 0,
            BACKWARD=is_backward, WIDE=tl_dtype(compute_dtype(x)),
            HEADS=power_of_two(heads), HALF=power_of_two(width // 2),
        )  # fmt: skip
    return out


@jit
def _kernel(
    x, out, cos, sin, heads, length, half,
    x_batch, x_head, x_token, out_batch, out_head, out_token, cos_batch, sin_batch,
    BACKWARD: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    batch = (program // length).to(tl.int64)
    token = (program % length).to(tl.int64)
    column = tl.arange(0, HALF)
    there = column < half
    cos += batch * cos_batch + token * 2 * half
    sin += batch * sin_batch + token * 2 * half
    cos_a = tl.load(cos + column, mask=there, other=0.0).to(WIDE)[None, :]
    cos_b = tl.load(cos + half + column, mask=there, other=0.0).to(WIDE)[None, :]
    sin_a = tl.load(sin + column, mask=there, other=0.0).to(WIDE)[None, :]
    sin_b = tl.load(sin + half + column, mask=there, other=0.0).to(WIDE)[None, :]
    if BACKWARD:
        sin_a, sin_b = -sin_b, -sin_a
    head = tl.arange(0, HEADS).to(tl.int64)[:, None]  # a head's stride may be all of a long row
    inside = (head < heads) & there[None, :]
    source = x + batch * x_batch + token * x_token + head * x_head + column[None, :]
    target = out + batch * out_batch + token * out_token + head * out_head + column[None, :]
    a = tl.load(source, mask=inside, other=0.0).to(WIDE)
    b = tl.load(source + half, mask=inside, other=0.0).to(WIDE)
    tl.store(target, (a * cos_a - b * sin_a).to(out.dtype.element_ty), mask=inside)
    tl.store(target + half, (b * cos_b + a * sin_b).to(out.dtype.element_ty), mask=inside)
