"""What a tuner is: how a model is made to learn with few weights (or all of them), and what of it is saved.

A tuner's file declares its ``Options`` (a config Section; importing it costs nothing, so torch and peft are imported
inside functions) and one ``TUNER``. Its methods run in the order in which they stand here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from swift_dist.config import JobConfig

Strategy = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]


class Tuner:
    """The default of every step: nothing. Subclasses override what they need.

    Attributes:
        name: the file's name.
        summary: one line for people, with the paper.
        saves: what an export holds: the whole model ("model") or an adapter beside it ("adapter").
        is_addition: whether it leaves to another tuner what learns and what is saved (GaLore, NEFTune).
        contradicts: names of tuners that it cannot be combined with.
    """

    name: str
    summary: str
    saves: Literal["model", "adapter"] = "model"
    is_addition: bool = False
    contradicts: frozenset[str] = frozenset()

    def refuses(self, strategy: Strategy, options: Any) -> str | None:
        """Why it cannot work under `strategy`; None: it can."""
        return None

    def check(self, job: JobConfig, options: Any) -> None:
        """Asked before anything starts, and again once `job.train.steps` is known.

        Raises:
            JobError: options that the job contradicts, whatever the model.
        """

    def load_arguments(self, options: Any) -> dict[str, Any]:
        """Further arguments of ``from_pretrained`` (a quantised base)."""
        return {}

    def apply(
        self, model: torch.nn.Module, options: Any, *, seed: int, trainable: Sequence[str] = ()
    ) -> torch.nn.Module:
        """Freeze, add or wrap; returns the model to train. The same on every rank: random values come from `seed`.

        Called on whole weights on the CPU, before a strategy shards them; on ranks that get their weights from the
        first one (FSDP2, ZeRO-3), on the meta device: numbers may depend on those of the weights, which tensors there
        are and what learns may not. `trainable`: patterns of further weights that learn and are saved whole
        (``tuner.trainable``)."""
        return model

    def without(self, model: torch.nn.Module) -> AbstractContextManager[Any] | None:
        """A context in which the model computes what it did before `apply`, whatever it has learnt since; None: there
        is none, and a reference model needs weights of its own."""
        return None

    def learning_rate_scale(self, parameter_name: str, options: Any) -> float:
        """This parameter's learning rate as a multiple of the job's (LoRA+)."""
        return 1.0

    def optimizer(self, groups: list[dict[str, Any]], make: Any, options: Any) -> torch.optim.Optimizer:
        """The optimizer over parameter `groups`; `make(groups)` is the job's own."""
        return make(groups)

    def before_step(self, model: torch.nn.Module, step: int, steps: int, options: Any) -> None:
        """Called on every rank before the first forward pass of optimizer step number `step`, of 0 .. `steps` - 1 (LISA
        moves its freeze)."""

    def before_update(
        self, model: torch.nn.Module, step: int, steps: int, options: Any, *, gradient_scale: float = 1.0
    ) -> None:
        """Called when the gradients of a step are complete and finite, before they are clipped and used (AdaLoRA).
        `gradient_scale` is what they are multiplied with: fp16's loss scale."""

    def state(self, model: torch.nn.Module) -> dict[str, Any]:
        """Plain values and small tensors that a resume needs beside the weights and the optimizer."""
        return {}

    def load_state(self, model: torch.nn.Module, state: dict[str, Any]) -> None:
        """Take over `state`."""

    def export(
        self, model: torch.nn.Module, weights: dict[str, torch.Tensor], options: Any, folder: Path, max_shard_size: str
    ) -> None:
        """Write what ``from_pretrained`` (transformers, or PEFT for an adapter) reads.

        Args:
            model: the model that `apply` returned; its own weights may be sharded and are not read.
            weights: whole tensors by the names of ``model.state_dict()``: of `exported` ones. On one rank only.
        """
        raise NotImplementedError

    def exported(self, model: torch.nn.Module) -> list[str]:
        """Names of the entries of ``model.state_dict()`` that `export` needs: all, or the adapter's."""
        return list(model.state_dict())
