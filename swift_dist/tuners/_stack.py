"""The tuners of a job as one: ``tuner.name`` is a list, applied in its order."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_dist.config.section import Section
from swift_dist.errors import JobError
from swift_dist.plugins import UnknownPlugin, find
from swift_dist.tuners.base import Strategy, Tuner

if TYPE_CHECKING:
    import torch

    from swift_dist.config import JobConfig

_ROOM = "swift_dist.tuners"


@dataclass(frozen=True)
class TunerStack:
    """What engines see of the tuners: the methods of `Tuner`, without options.

    Exactly one of them says what learns and writes the export (`main`); the others are additions. A list of additions
    only stands for full fine-tuning with them.

    Args:
        members: (tuner, its options), in the order in which they are applied.
        trainable: ``tuner.trainable``.
    """

    members: tuple[tuple[Tuner, Any], ...]
    trainable: tuple[str, ...] = ()

    @property
    def main(self) -> tuple[Tuner, Any]:
        return next((tuner, options) for tuner, options in self.members if not tuner.is_addition)

    @property
    def saves(self) -> str:
        return self.main[0].saves

    @property
    def changes_gradients(self) -> bool:
        """Whether `before_update` does anything."""
        return any(type(tuner).before_update is not Tuner.before_update for tuner, _ in self.members)

    @property
    def name(self) -> str:
        return "+".join(tuner.name for tuner, _ in self.members)

    def refuse(self, strategy: Strategy) -> None:
        """Raises:
        JobError: one of them cannot work under `strategy`.
        """
        for tuner, options in self.members:
            reason = tuner.refuses(strategy, options)
            if reason is not None:
                able = [s for s in ("ddp", "fsdp2", "zero2", "zero3") if self._runs_under(s)]  # type: ignore[arg-type]
                raise JobError(
                    "tuner.name",
                    f"{tuner.name} does not work under {strategy}: {reason}",
                    f"use {' or '.join(able)}, or another tuner" if able else "use another tuner",
                )

    def check(self, job: JobConfig) -> None:
        """Raises:
        JobError: one of them contradicts the job.
        """
        for tuner, options in self.members:
            tuner.check(job, options)

    def _runs_under(self, strategy: Strategy) -> bool:
        return all(tuner.refuses(strategy, options) is None for tuner, options in self.members)

    def load_arguments(self) -> dict[str, Any]:
        return {key: value for tuner, options in self.members for key, value in tuner.load_arguments(options).items()}

    def apply(self, model: torch.nn.Module, *, seed: int) -> torch.nn.Module:
        main = self.main[0]
        for tuner, options in self.members:
            trainable = self.trainable if tuner is main else ()
            model = tuner.apply(model, options, seed=seed, trainable=trainable)
        return model

    def without(self, model: torch.nn.Module) -> AbstractContextManager[Any] | None:
        """See `Tuner.without`: of the main one; additions act in training only."""
        return self.main[0].without(model)

    def learning_rate_scale(self, parameter_name: str) -> float:
        scale = 1.0
        for tuner, options in self.members:
            scale *= tuner.learning_rate_scale(parameter_name, options)
        return scale

    def optimizer(self, groups: list[dict[str, Any]], make: Callable[..., Any]) -> torch.optim.Optimizer:
        """Each tuner's optimizer is what the next one wraps; the first wraps the job's own."""
        for tuner, options in self.members:
            make = _wrapped(tuner, options, make)
        optimizer: torch.optim.Optimizer = make(groups)
        return optimizer

    def before_step(self, model: torch.nn.Module, step: int, steps: int) -> None:
        for tuner, options in self.members:
            tuner.before_step(model, step, steps, options)

    def before_update(self, model: torch.nn.Module, step: int, steps: int, *, gradient_scale: float = 1.0) -> None:
        for tuner, options in self.members:
            tuner.before_update(model, step, steps, options, gradient_scale=gradient_scale)

    def state(self, model: torch.nn.Module) -> dict[str, Any]:
        states = {tuner.name: tuner.state(model) for tuner, _ in self.members}
        return {name: state for name, state in states.items() if state}

    def load_state(self, model: torch.nn.Module, state: dict[str, Any]) -> None:
        for tuner, _ in self.members:
            if tuner.name in state:
                tuner.load_state(model, state[tuner.name])

    def exported(self, model: torch.nn.Module) -> list[str]:
        return self.main[0].exported(model)

    def export(
        self, model: torch.nn.Module, weights: dict[str, torch.Tensor], folder: Path, max_shard_size: str = "5GB"
    ) -> None:
        main, options = self.main
        main.export(model, weights, options, folder, max_shard_size)


def find_tuners(section: Any) -> TunerStack:
    """The tuners that a job's ``tuner`` section names, with their options there.

    Raises:
        JobError: one is unknown or named twice, two of them contradict each other, or there are options of one that is
            not named.
    """
    _refuse_unread(section)
    members: list[tuple[Tuner, Any]] = []
    for name in section.name:
        try:
            tuner: Tuner = find(_ROOM, name, "TUNER")
        except UnknownPlugin as error:
            meant = " or ".join(error.suggestions) or ", ".join(error.known)
            raise JobError("tuner.name", str(error), f"use {meant}") from None
        options = getattr(section, name, None) if ":" not in name else _own_defaults(name)
        members.append((tuner, options))
    _refuse_contradictions([tuner for tuner, _ in members])
    if all(tuner.is_addition for tuner, _ in members):
        members.insert(0, (find(_ROOM, "full", "TUNER"), None))
    return TunerStack(tuple(members), tuple(section.trainable))


def _own_defaults(name: str) -> Any:
    """Options of a tuner from outside: its file's defaults."""
    options = getattr(importlib.import_module(name.partition(":")[0]), "Options", None)
    return options() if options is not None else None


def _refuse_unread(section: Any) -> None:
    for name in type(section).model_fields:
        options = getattr(section, name)
        if name not in section.name and isinstance(options, Section) and options != type(options)():
            raise JobError(
                f"tuner.{name}",
                f"has options, and tuner.name ({', '.join(section.name)}) does not name it",
                f"name it, or give those of tuner.{section.name[0]} instead",
            )


def _refuse_contradictions(tuners: list[Tuner]) -> None:
    names = [tuner.name for tuner in tuners]
    for name in names:
        if names.count(name) > 1:
            raise JobError("tuner.name", f"{name} is named twice", "name it once")
    deciding = [tuner.name for tuner in tuners if not tuner.is_addition]
    for first, second in pairwise(deciding):
        raise JobError(
            "tuner.name",
            f"{first} and {second} both say which weights learn and how they are saved",
            f"use one of them; several adapters on one model: swift_dist.prepare_model ({first} alone in a job)",
        )
    for tuner in tuners:
        for other in sorted(tuner.contradicts.intersection(names)):
            raise JobError("tuner.name", f"{tuner.name} and {other} contradict each other", f"leave out {tuner.name}")


def _wrapped(tuner: Tuner, options: Any, make: Callable[..., Any]) -> Callable[..., Any]:
    return lambda groups: tuner.optimizer(groups, make, options)
