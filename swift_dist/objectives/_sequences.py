"""Sums over the tokens of each sequence, in an order that does not depend on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from swift_dist.objectives.base import Batch


def sequence_sums(values: torch.Tensor, segments: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """``sums[s] = sum of values[t] where segments[t] == s``; 0 for a sequence without tokens.

    A segmented reduction of tokens brought into the order of their sequences: no atomic additions, which CUDA's
    ``index_add`` makes in whatever order they arrive, so the same batch gives the same bits. Added up in float64: a
    preference loss is a small difference of sums over thousands of tokens.

    Args:
        values: floating [N]; gradients flow through them.
        segments: int64 [N], in any order.

    Returns:
        [num_sequences] in the dtype of `values`.
    """
    import torch

    ordered, order = torch.sort(segments, stable=True)
    # Where each sequence begins; and unsafe: lengths are right by construction. Neither waits for the device.
    begins = torch.searchsorted(ordered, torch.arange(num_sequences + 1, device=segments.device))
    sums = torch.segment_reduce(values[order].double(), "sum", lengths=begins.diff(), unsafe=True)
    return sums.to(values.dtype)


def weighted_sums(batch: Batch, values: torch.Tensor) -> torch.Tensor:
    """[num_sequences]: each sequence's sum of weight * value over its tokens."""
    return sequence_sums(batch.weights * values, batch.segments, len(batch.lengths))


def log_ratios(batch: Batch) -> torch.Tensor:
    """[num_sequences]: log pi(y | x) / ref(y | x), how much more likely the model makes each answer than the reference
    does; log pi(y | x) without a reference. The two sums are large and close to each other, so their difference would
    lose digits: it is taken token by token, or in float64."""
    assert batch.logps is not None
    if batch.reference_sums is not None:
        sums = sequence_sums((batch.weights * batch.logps).double(), batch.segments, len(batch.lengths))
        return (sums - batch.reference_sums).to(batch.logps.dtype)
    if batch.reference_logps is not None:
        return weighted_sums(batch, batch.logps - batch.reference_logps)
    return weighted_sums(batch, batch.logps)


def real_samples(batch: Batch) -> torch.Tensor:
    """int64 [k], the samples that are not there to fill the batch up."""
    return batch.sample_weights.nonzero().squeeze(1)


def count_samples(batch: Batch) -> torch.Tensor:
    """Number of real samples of the micro-batch: the `count` of objectives that average over samples."""
    return (batch.sample_weights > 0).sum().to(batch.sample_weights.dtype)


def mean_of(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A metric that is the mean of `values` [k] over the global batch: (sum, k)."""
    values = values.detach()
    return values.sum(), values.new_full((), values.numel())


def in_float32(values: torch.Tensor) -> torch.Tensor:
    """`values` in float32, or wider where they are: what half-precision scores are computed on in."""
    import torch

    return values.to(torch.promote_types(values.dtype, torch.float32))
