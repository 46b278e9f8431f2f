"""Engines: what runs the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from swift_dist.engines.base import DataCoordinates, Engine, Evaluation, MicroBatch, StepResult

if TYPE_CHECKING:
    from swift_dist.config import JobConfig
    from swift_dist.runs.worker import Worker

__all__ = ["DataCoordinates", "Engine", "Evaluation", "MicroBatch", "StepResult", "build_engine"]


def build_engine(job: JobConfig, hf_config: dict[str, Any], worker: Worker) -> Engine:
    """The engine that the job names, on this rank, with randomly initialised weights.

    Raises:
        JobError: the job asks for something that this engine or this machine does not have.
    """
    if job.engine == "hf":
        from swift_dist.engines.hf.engine import HFEngine

        return HFEngine(job, hf_config, worker)
    from swift_dist.engines.megatron.engine import MegatronEngine
    from swift_dist.models import find_family
    from swift_dist.parallel import ParallelLayout

    family = find_family(hf_config)
    layout = ParallelLayout.resolve(job.parallel, worker.world_size, family.shape(hf_config).is_moe)
    return MegatronEngine(job, layout, family, hf_config, worker)
