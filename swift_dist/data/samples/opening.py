"""Encoded rows as plain values that travel to the ranks, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from swift_dist.config.job import JobConfig
from swift_dist.data.samples.collate import Layout
from swift_dist.data.samples.loader import SampleData
from swift_dist.data.samples.store import DamagedStoreError, SampleStore
from swift_dist.data.samples.stream import StreamPlan
from swift_dist.errors import RunError


def stores_as_values(train: Sequence[SampleStore], validation: Sequence[SampleStore]) -> dict[str, Any]:
    """What `open_samples` takes."""
    return {
        "kind": train[0].kind,
        "train": [store.arguments() for store in train],
        "validation": [store.arguments() for store in validation],
    }


def stream_as_values(plan: StreamPlan, validation: Sequence[SampleStore]) -> dict[str, Any]:
    """What `open_samples` takes, where data.train is streamed."""
    values = [store.arguments() for store in validation]
    return {"kind": plan.kind, "train": [], "validation": values, "stream": plan.as_values()}


def open_samples(
    values: Mapping[str, Any],
    job: JobConfig,
    *,
    dp_rank: int,
    dp_size: int,
    layout: Layout,
    pad_id: int,
    waiting: Callable[[int], None] | None = None,
) -> SampleData:
    """The data of one data-parallel rank.

    Args:
        waiting: see `SampleData`.

    Raises:
        JobError: see `SampleData`.
        RunError: a store is not there, or damaged, on this node.
    """
    try:
        train = [SampleStore(**arguments) for arguments in values["train"]]
        validation = [SampleStore(**arguments) for arguments in values["validation"]]
    except DamagedStoreError as error:
        raise RunError(
            f"encoded rows cannot be read: {error}", "every node must see data.cache; run the same command again"
        ) from None
    return SampleData(
        train,
        validation,
        job,
        sample_kind=values["kind"],
        dp_rank=dp_rank,
        dp_size=dp_size,
        layout=layout,
        pad_id=pad_id,
        stream=StreamPlan(**values["stream"]) if values.get("stream") else None,
        waiting=waiting,
    )
