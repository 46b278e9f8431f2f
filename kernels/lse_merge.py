"""Merging attention over two sets of keys into attention over both: the step of ring attention (arXiv 2310.01889).

Given out_i = softmax(S_i) V_i and lse_i = log sum exp(S_i) for i = a, b, of the same queries:

    lse = log(exp lse_a + exp lse_b),  p_i = exp(lse_i - lse),  out = p_a out_a + p_b out_b
    d out_i = p_i dout,  d lse_i = p_i (dlse + <dout, out_i - out>)

A query that sees none of the keys of a set has lse_i = -inf there, and out_i does not matter; one that sees none at all
gets out = 0 and lse = -inf, and no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from swift_dist.kernels._triton import Backend, jit, on_triton, power_of_two, tl, tl_dtype

_ROWS = 16
Pair = tuple[torch.Tensor, torch.Tensor]


def reference(out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor) -> Pair:
    """The formula in plain torch, differentiated by autograd; finite lse only."""
    lse = torch.logaddexp(lse_a, lse_b)
    shares = (torch.exp(lse_a - lse).unsqueeze(-1), torch.exp(lse_b - lse).unsqueeze(-1))
    return shares[0] * out_a + shares[1] * out_b, lse


def lse_merge(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    *,
    backend: Backend = "auto",
) -> Pair:
    """Attention over the union of two disjoint sets of keys.

    Args:
        out_a, out_b: floating [..., d].
        lse_a, lse_b: float32 (float64) [...], natural logarithm.

    Returns:
        out [..., d] in the dtype of lse (so that many merges round once, at the end), lse [...].
    """
    if out_a.shape != out_b.shape or out_a.shape[:-1] != lse_a.shape or lse_a.shape != lse_b.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (out_a, lse_a, out_b, lse_b))
        raise ValueError(f"{shapes} do not fit together")
    if lse_a.dtype != lse_b.dtype or lse_a.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"lse of {lse_a.dtype} and {lse_b.dtype}: should both be float32, or float64")
    kernel = on_triton(backend, out_a)
    result: Pair = _Merge.apply(out_a, lse_a, out_b, lse_b, kernel)
    return result


def lse_merge_(out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor) -> None:
    """`lse_merge` written over out_a and lse_a, without gradient: for a backward pass that is computed otherwise.

    Args:
        out_a: of lse's dtype; views are fine. lse_b: finite (every query has seen a key of b).
    """
    if on_triton("auto", out_a):
        out, lse = lse_merge(out_a, lse_a, out_b, lse_b)
        out_a.copy_(out)
        lse_a.copy_(lse)
        return
    lse = torch.logaddexp(lse_a, lse_b)
    out_a.mul_(torch.exp(lse_a - lse).unsqueeze(-1))
    out_a.addcmul_(out_b.to(out_a.dtype), torch.exp(lse_b - lse).unsqueeze(-1))
    lse_a.copy_(lse)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor, kernel: bool
    ) -> Pair:
        if kernel:
            out, lse = _merged_by_kernel(out_a.contiguous(), lse_a.contiguous(), out_b.contiguous(), lse_b.contiguous())
        else:
            lse = torch.logaddexp(lse_a, lse_b)
            a, b = _shares(lse_a, lse_b, lse)
            # a set of which nothing is seen may hold anything, nan too
            out = torch.where(a > 0, a * out_a.to(lse.dtype), 0.0) + torch.where(b > 0, b * out_b.to(lse.dtype), 0.0)
        ctx.save_for_backward(out_a, lse_a, out_b, lse_b, out, lse)
        ctx.kernel = kernel
        ctx.set_materialize_grads(True)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor, dlse: torch.Tensor) -> tuple[Any, ...]:
        out_a, lse_a, out_b, lse_b, out, lse = ctx.saved_tensors
        if ctx.kernel:
            held = [tensor.contiguous() for tensor in (out_a, lse_a, out_b, lse_b, out, lse, dout, dlse)]
            return (*_gradients_by_kernel(held), None)
        a, b = _shares(lse_a, lse_b, lse)
        of_a, of_b = _gradients(a, out_a, out, dout, dlse), _gradients(b, out_b, out, dout, dlse)
        return of_a[0], of_a[1], of_b[0], of_b[1], None


def _shares(lse_a: torch.Tensor, lse_b: torch.Tensor, lse: torch.Tensor) -> Pair:
    nothing = torch.isneginf(lse)
    lse = torch.where(nothing, 0.0, lse)  # exp(-inf - 0) = 0, where -inf - -inf were nan
    return torch.exp(lse_a - lse).unsqueeze(-1), torch.exp(lse_b - lse).unsqueeze(-1)


def _gradients(
    share: torch.Tensor, part: torch.Tensor, out: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor
) -> Pair:
    difference = torch.where(share > 0, part.to(out.dtype) - out, 0.0)
    of_lse = share.squeeze(-1) * (dlse + (dout * difference).sum(-1))
    return (share * dout).to(part.dtype), of_lse


def _merged_by_kernel(out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor) -> Pair:
    out = torch.empty(out_a.shape, dtype=lse_a.dtype, device=out_a.device)
    lse = torch.empty_like(lse_a)
    rows, width = lse_a.numel(), out_a.shape[-1]
    if rows:
        _forward_kernel[(-(-rows // _ROWS),)](
            out_a, lse_a, out_b, lse_b, out, lse, rows, width,
            WIDE=tl_dtype(lse_a.dtype), ROWS=_ROWS, WIDTH=power_of_two(width),
        )  # fmt: skip
    return out, lse


def _gradients_by_kernel(held: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    results = [torch.empty_like(tensor) for tensor in held[:4]]
    rows, width = held[1].numel(), held[0].shape[-1]
    if rows:
        _backward_kernel[(-(-rows // _ROWS),)](
            *held, *results, rows, width,
            WIDE=tl_dtype(held[1].dtype), ROWS=_ROWS, WIDTH=power_of_two(width),
        )  # fmt: skip
    return tuple(results)


@jit
def _forward_kernel(
    out_a, lse_a, out_b, lse_b, out, lse, rows, width,
    WIDE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    there = row < rows
    inside = there[:, None] & (column < width)
    at = row[:, None] * width + column
    la = tl.load(lse_a + row, mask=there, other=float("-inf")).to(WIDE)
    lb = tl.load(lse_b + row, mask=there, other=float("-inf")).to(WIDE)
    largest = tl.maximum(la, lb)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    ea, eb = tl.exp(la - base), tl.exp(lb - base)
    total = ea + eb
    some = total > 0
    total = tl.where(some, total, 1.0)
    a, b = (ea / total)[:, None], (eb / total)[:, None]
    va = tl.load(out_a + at, mask=inside & (a > 0), other=0.0).to(WIDE)
    vb = tl.load(out_b + at, mask=inside & (b > 0), other=0.0).to(WIDE)
    tl.store(out + at, a * va + b * vb, mask=inside)
    tl.store(lse + row, tl.where(some, base + tl.log(total), float("-inf")), mask=there)


@jit
def _backward_kernel(
    out_a, lse_a, out_b, lse_b, out, lse, dout, dlse, of_out_a, of_lse_a, of_out_b, of_lse_b, rows, width,
    WIDE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    there = row < rows
    inside = there[:, None] & (column < width)
    at = row[:, None] * width + column
    whole = tl.load(lse + row, mask=there, other=float("-inf")).to(WIDE)
    whole = tl.where(whole == float("-inf"), 0.0, whole)
    merged = tl.load(out + at, mask=inside, other=0.0).to(WIDE)
    dy = tl.load(dout + at, mask=inside, other=0.0).to(WIDE)
    dl = tl.load(dlse + row, mask=there, other=0.0).to(WIDE)

    a = tl.exp(tl.load(lse_a + row, mask=there, other=float("-inf")).to(WIDE) - whole)
    raw_a = tl.load(out_a + at, mask=inside & (a > 0)[:, None], other=0.0)
    va = tl.where((a > 0)[:, None], raw_a.to(WIDE), merged)
    tl.store(of_out_a + at, (a[:, None] * dy).to(raw_a.dtype), mask=inside)
    tl.store(of_lse_a + row, a * (dl + tl.sum(dy * (va - merged), 1)), mask=there)

    b = tl.exp(tl.load(lse_b + row, mask=there, other=float("-inf")).to(WIDE) - whole)
    raw_b = tl.load(out_b + at, mask=inside & (b > 0)[:, None], other=0.0)
    vb = tl.where((b > 0)[:, None], raw_b.to(WIDE), merged)
    tl.store(of_out_b + at, (b[:, None] * dy).to(raw_b.dtype), mask=inside)
    tl.store(of_lse_b + row, b * (dl + tl.sum(dy * (vb - merged), 1)), mask=there)
