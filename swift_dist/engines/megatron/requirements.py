"""What a job asks of this engine and machine that they may lack; light, so that the driver checks it too."""

from __future__ import annotations

import importlib.util

from swift_dist.config import JobConfig
from swift_dist.errors import JobError


def have_transformer_engine() -> bool:
    """Whether transformer-engine is installed (its classes, FP8 and grouped matrix products are then used)."""
    return importlib.util.find_spec("transformer_engine") is not None


def check(job: JobConfig, *, on_cuda: bool) -> None:
    """Refuse what this engine or this machine cannot do, before anything is built.

    Raises:
        JobError: naming the key.
    """
    if job.train.fp8 != "none":
        if not (on_cuda and have_transformer_engine()):
            raise JobError(
                "train.fp8", "needs an NVIDIA GPU and transformer-engine", "pip install 'swift-dist[gpu]', or fp8: none"
            )
        if job.train.precision != "bf16":
            raise JobError("train.fp8", f"works with train.precision bf16, not {job.train.precision}", "use bf16")
    _check_optimizer(job)


def _check_optimizer(job: JobConfig) -> None:
    name, sharded = job.optimizer.name, job.parallel.use_distributed_optimizer
    if name != "adamw" and sharded:
        raise JobError(
            "parallel.use_distributed_optimizer",
            f"true is not possible with optimizer.name: {name} (megatron-core shards AdamW's state only)",
            "--parallel.use_distributed_optimizer false",
        )
    if name != "muon":
        return
    if importlib.util.find_spec("emerging_optimizers") is None:
        raise JobError(
            "optimizer.name",
            "muon needs the package emerging_optimizers, which is not installed",
            "install it from github.com/NVIDIA-NeMo/Emerging-Optimizers, or use optimizer.name: adamw",
        )
    if job.train.precision == "fp16":
        raise JobError("optimizer.name", "muon does not work with train.precision fp16", "use bf16 or fp32")
