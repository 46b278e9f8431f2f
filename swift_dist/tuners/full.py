"""Full fine-tuning: every weight learns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_dist.errors import JobError
from swift_dist.tuners._export import write_model
from swift_dist.tuners.base import Tuner

if TYPE_CHECKING:
    import torch

    from swift_dist.config import JobConfig


class Full(Tuner):
    name = "full"
    summary = "every weight learns; the whole model is saved"

    def check(self, job: JobConfig, options: Any) -> None:
        if job.tuner.trainable:
            raise JobError("tuner.trainable", "with full every weight learns", "leave it out")

    def apply(
        self, model: torch.nn.Module, options: Any, *, seed: int, trainable: Sequence[str] = ()
    ) -> torch.nn.Module:
        return model.requires_grad_(True)

    def export(
        self, model: torch.nn.Module, weights: dict[str, torch.Tensor], options: Any, folder: Path, max_shard_size: str
    ) -> None:
        write_model(model, weights, folder, max_shard_size)


TUNER = Full()
