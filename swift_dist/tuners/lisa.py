"""LISA: a few layers learn at a time, other ones every so many steps; what is outside the layers always learns."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from swift_dist.config.section import Section
from swift_dist.errors import JobError
from swift_dist.tuners._decoder import layers_of
from swift_dist.tuners._export import write_model
from swift_dist.tuners.base import Strategy, Tuner

if TYPE_CHECKING:
    import torch

    from swift_dist.config import JobConfig

_SEED = "swift_dist_lisa_seed"  # attribute of the model


class Options(Section):
    active_layers: int = Field(2, gt=0, description="layers that learn at a time")
    interval: int = Field(20, gt=0, description="steps after which others do")


class Lisa(Tuner):
    name = "lisa"
    summary = "all weights, a few layers at a time (LISA, arXiv 2403.17919)"

    def refuses(self, strategy: Strategy, options: Options) -> str | None:
        if strategy.startswith("zero"):
            return "DeepSpeed lays out what learns once, and would go on moving layers that have been frozen since"
        return None

    def check(self, job: JobConfig, options: Options) -> None:
        if job.tuner.trainable:
            raise JobError("tuner.trainable", "with lisa every weight may learn", "leave it out")

    def apply(
        self, model: torch.nn.Module, options: Options, *, seed: int, trainable: Sequence[str] = ()
    ) -> torch.nn.Module:
        """Every weight may learn, so that optimizers and checkpoints know of all; `before_step` freezes.

        Raises:
            JobError: the model has fewer layers than are to be active.
        """
        _, layers = layers_of(model, self.name)
        if options.active_layers > len(layers):
            raise JobError(
                "tuner.lisa.active_layers",
                f"{options.active_layers} of {len(layers)} layers",
                "choose fewer, or use full",
            )
        setattr(model, _SEED, seed)
        return model.requires_grad_(True)

    def before_step(self, model: torch.nn.Module, step: int, steps: int, options: Options) -> None:
        """Freeze all layers but this interval's; a frozen one has no gradient, so the optimizer passes it by."""
        _, layers = layers_of(model, self.name)
        active = active_layers(getattr(model, _SEED), step, len(layers), options)
        for index, layer in enumerate(layers):
            for parameter in layer.parameters():
                parameter.requires_grad_(index in active)
                if index not in active:
                    parameter.grad = None

    def export(
        self, model: torch.nn.Module, weights: dict[str, torch.Tensor], options: Any, folder: Path, max_shard_size: str
    ) -> None:
        write_model(model, weights, folder, max_shard_size)


def active_layers(seed: int, step: int, num_layers: int, options: Options) -> set[int]:
    """Numbers of the layers that learn in optimizer step number `step`: the same on every rank and in every resume."""
    chance = random.Random(f"lisa {seed} {step // options.interval}")  # a string is hashed the same everywhere
    return set(chance.sample(range(num_layers), options.active_layers))


TUNER = Lisa()
