"""What the training loop knows of an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from swift_dist.parallel import ParallelLayout

MicroBatch = dict[str, "torch.Tensor"]
"""tokens, labels, position_ids: int64 [micro batch, sequence]; loss_mask: float32 of the same shape. With
data.separate_documents a document begins wherever a position is 0."""


@dataclass(frozen=True)
class DataCoordinates:
    """Which data this rank reads.

    Args:
        dp_rank, dp_size: its place among the data-parallel replicas; ranks of one replica read the same samples.
        cp_rank, cp_size: its place along the sequence; the engine itself cuts the sequence.
        needs_data: False for a rank that neither embeds tokens, nor computes the loss, nor keeps documents apart (a
            middle pipeline stage).
    """

    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    needs_data: bool


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank.

    Args:
        loss: mean over the tokens that count (loss_mask) of the global batch, without auxiliary losses.
        grad_norm: global 2-norm of the gradients before clipping; nan where a skipped step did not compute it.
        lr: learning rate of this step.
        tokens: tokens of the global batch that count in the loss.
        skipped: the weights were left as they were.
        reason: why, if skipped.
        stop: some rank was asked to stop.
        metrics: what else the objective reports, by name: means over the global batch.
    """

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    skipped: bool = False
    reason: str = ""
    stop: bool = False
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Mean loss (nan: nothing was evaluated), what else the objective reports, and how the model answers some of the
    samples: number (of the sequence among all of the job's), prompt, expected, answer. The same on every rank."""

    loss: float
    metrics: dict[str, float] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)


class Engine(Protocol):
    """Holds this rank's part of the model and the optimizer. Methods are collective: all ranks call them alike."""

    layout: ParallelLayout
    data: DataCoordinates
    flops_per_token: float
    content_metadata: dict[str, Any]
    """How the checkpoint's keys are to be read; saved with it."""
    exports: bool
    """Whether `export` writes anything."""

    def prepare(self, data: Any, show: Callable[[float], None]) -> bool:
        """What is left to be done before the first step, once the data are open and a checkpoint is loaded; `show` is
        told now and then which share is done. Returns whether some rank was asked to stop meanwhile."""
        ...

    def train_step(self, micro_batches: list[MicroBatch], step: int, *, stop: bool = False) -> StepResult:
        """One optimizer step (number `step`, from 0) on this rank's micro-batches ([] where it needs no data)."""
        ...

    def evaluate(self, batches: Iterable[list[MicroBatch]]) -> Evaluation:
        """Mean loss over some global batches, with dropout off."""
        ...

    def sharded_state_dict(self, is_loading: bool = False) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def load_pretrained(self, folder: Path) -> None:
        """Take the weights of a Hugging Face folder (nothing for an engine that was made with them)."""
        ...

    def export(self, run_dir: Path) -> Path | None:
        """Write the final weights in a form that others read, into `run_dir`; None: the checkpoints are what it
        leaves (`swift-dist convert` makes other forms of them)."""
        ...

    def close(self) -> None:
        """Leave the process groups and free everything, also after a peer died. May be called twice."""
        ...
