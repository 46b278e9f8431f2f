"""Log-probabilities of given tokens, without a second copy of the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 22
"""Logits that are brought to float32 at a time: 16 MiB."""


def token_logps(logits: torch.Tensor, labels: torch.Tensor, *, reuse_logits: bool = False) -> torch.Tensor:
    """``log softmax(logits)[label]`` in float32, exact for half-precision logits too.

        logp = x[y] - log sum_v exp(x[v]),  d logp / d x = onehot(y) - softmax(x)

    ``log_softmax`` keeps a float32 tensor of the logits' shape for its backward pass; this keeps the logits, which
    exist, and one number a token, and computes the softmax again, some rows at a time. As Liger-Kernel's cross entropy
    (arXiv 2410.10989), in plain torch.

    Args:
        logits: floating [..., V].
        labels: int64 [...], each in [0, V).
        reuse_logits: let the backward pass write the gradient over the logits, which nobody may read afterwards; it
            has no effect on a leaf, whose values are somebody's. A second backward pass raises.

    Returns:
        float32 (float64 of float64 logits) [...].
    """
    assert logits.shape[:-1] == labels.shape, (logits.shape, labels.shape)
    rows = logits.reshape(-1, logits.shape[-1])
    flat: torch.Tensor = _TokenLogps.apply(rows, labels.reshape(-1), reuse_logits and not logits.is_leaf)
    return flat.view(labels.shape)


class _TokenLogps(torch.autograd.Function):
    """[N, V], [N] -> [N]. One buffer of some rows serves all of them, in either direction."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, in_place: bool) -> torch.Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        normalizers = torch.empty(len(logits), dtype=dtype, device=logits.device)
        buffer = _buffer(logits, dtype)
        for rows in _chunks(logits):
            part = buffer[: len(labels[rows])].copy_(logits[rows])
            largest = part.amax(1, keepdim=True)
            normalizers[rows] = part.sub_(largest).exp_().sum(1).log_().add_(largest.squeeze(1))
        ctx.save_for_backward(logits, labels, normalizers)
        ctx.in_place = in_place
        return logits.gather(1, labels[:, None]).squeeze(1).to(dtype) - normalizers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, labels, normalizers = ctx.saved_tensors
        result = logits if ctx.in_place else torch.empty_like(logits)
        is_wide = result.dtype == normalizers.dtype  # computed where it is to be
        buffer = result if is_wide else _buffer(logits, normalizers.dtype)
        for rows in _chunks(logits):
            part = result[rows] if is_wide else buffer[: len(labels[rows])]
            part.copy_(logits[rows]).sub_(normalizers[rows, None]).exp_().mul_(-gradients[rows, None])
            part.scatter_add_(1, labels[rows, None], gradients[rows, None])
            if not is_wide:
                result[rows] = part
        return result, None, None


def _rows_at_a_time(logits: torch.Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // logits.shape[1])


def _chunks(logits: torch.Tensor) -> list[slice]:
    size = _rows_at_a_time(logits)
    return [slice(start, start + size) for start in range(0, len(logits), size)]


def _buffer(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Room for one chunk."""
    return logits.new_empty((min(_rows_at_a_time(logits), len(logits)), logits.shape[1]), dtype=dtype)
