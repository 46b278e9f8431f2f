"""Text to tokens (`prepare`), rows to samples (`rows`, `templates`, `samples`), and either to micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swift_dist.config import JobConfig
    from swift_dist.data.loader import TrainingData
    from swift_dist.data.samples.loader import SampleData


def open_data(
    job: JobConfig, engine: Any, payload: Mapping[str, Any], waiting: Callable[[int], None] | None = None
) -> TrainingData | SampleData:
    """What a rank is fed: prepared text to pretrain on, or the samples that the driver had encoded.

    Args:
        job: the job.
        engine: whose ``data`` says which part this rank reads; the hf engine's ``batch_layout`` how it is laid out.
        payload: the rank's; ``samples`` in it says where encoded samples lie (None: prepared text).
        waiting: called about every second with the step whose rows are still being encoded (data.streaming).

    Raises:
        JobError: data missing or corrupt, or a global batch that the ranks cannot share out.
    """
    place = engine.data
    if payload.get("samples"):
        from swift_dist.data.samples.opening import open_samples

        return open_samples(
            payload["samples"],
            job,
            dp_rank=place.dp_rank,
            dp_size=place.dp_size,
            layout=engine.batch_layout,
            pad_id=engine.pad_id,
            waiting=waiting,
        )
    from swift_dist.data.loader import TrainingData

    return TrainingData(
        job.data,
        seed=job.train.seed,
        global_batch_size=job.train.global_batch_size,
        micro_batch_size=job.train.micro_batch_size,
        dp_rank=place.dp_rank,
        dp_size=place.dp_size,
        needs_data=place.needs_data,
        vocab_size=payload.get("vocab_size"),
    )
