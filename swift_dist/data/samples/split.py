"""Which samples of data.train are kept for validation (data.split_ratio)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from swift_dist.data.samples.store import SampleStore
from swift_dist.errors import JobError


def split_by_content(hashes: np.ndarray, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Share samples out by the hash of their row's content: the same ones whatever the seed and the order of rows.

    Samples with the same hash (rows that occur twice, the pieces of one row) stay together.

    Args:
        hashes: uint64 [n]; ratio: share of validation, to the nearest sample (and what has to stay together).

    Returns:
        int64 indices of training and of validation, both in the order of the store.
    """
    count = round(ratio * len(hashes))
    if count == 0:
        return np.arange(len(hashes), dtype=np.int64), np.empty(0, np.int64)
    kept = hashes <= np.partition(hashes, count - 1)[count - 1]
    return np.flatnonzero(~kept), np.flatnonzero(kept)


def split_stores(stores: Sequence[SampleStore], ratio: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Indices of training and of validation of each store.

    Raises:
        JobError: a source would give nothing to train on, or none of them anything for validation.
    """
    train, validation = [], []
    for store in stores:
        kept, taken = split_by_content(store.hashes, ratio)
        if not len(kept):
            raise JobError(
                "data.split_ratio",
                f"{ratio:g} of the {store.num_samples} samples of {store.name} leaves none to train on",
                "lower it, or give data.validation",
            )
        train.append(kept)
        validation.append(taken)
    if ratio and not sum(map(len, validation)):
        total = sum(store.num_samples for store in stores)
        raise JobError(
            "data.split_ratio", f"{ratio:g} of {total} samples is not one sample", "raise it, or give data.validation"
        )
    return train, validation
