"""Partial fine-tuning: the weights that rules name stay as they are, the others learn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from swift_dist.config.finetune import AnyNames
from swift_dist.config.section import Section
from swift_dist.errors import JobError
from swift_dist.tuners._export import write_model
from swift_dist.tuners._patterns import matching
from swift_dist.tuners.base import Tuner

if TYPE_CHECKING:
    import torch

    from swift_dist.config import JobConfig


class Options(Section):
    parameters: AnyNames = Field((), description="patterns of weights that do not learn, such as layers.[0-3]")
    ratio: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the model, from the embedding upwards, that does not learn (at most: whole weights)",
    )


class Freeze(Tuner):
    name = "freeze"
    summary = "the weights that patterns or a ratio name stay; the others learn"

    def check(self, job: JobConfig, options: Options) -> None:
        if not options.parameters and not options.ratio:
            raise JobError(
                "tuner.freeze",
                "it says of no weight that it stays",
                "give tuner.freeze.parameters or tuner.freeze.ratio",
            )

    def apply(
        self, model: torch.nn.Module, options: Options, *, seed: int, trainable: Sequence[str] = ()
    ) -> torch.nn.Module:
        """`trainable` wins over both rules.

        Raises:
            JobError: a pattern matches nothing, or nothing is left to learn.
        """
        parameters = dict(model.named_parameters())
        frozen = set(matching(parameters, options.parameters, "tuner.freeze.parameters"))
        left = options.ratio * sum(p.numel() for p in parameters.values())
        for name, parameter in parameters.items():
            left -= parameter.numel()
            if left < 0:
                break
            frozen.add(name)
        frozen -= set(matching(parameters, trainable, "tuner.trainable"))
        if len(frozen) == len(parameters):
            raise JobError("tuner.freeze", "no weight is left to learn", "freeze less, or give tuner.trainable")
        for name, parameter in parameters.items():
            parameter.requires_grad_(name not in frozen)
        return model

    def export(
        self, model: torch.nn.Module, weights: dict[str, torch.Tensor], options: Any, folder: Path, max_shard_size: str
    ) -> None:
        write_model(model, weights, folder, max_shard_size)


TUNER = Freeze()
