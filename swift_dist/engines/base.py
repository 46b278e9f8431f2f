"""What the training loop knows of an engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from swift_dist.parallel import ParallelLayout

MicroBatch = dict[str, "torch.Tensor"]
"""tokens, labels, position_ids: int64 [micro batch, sequence]; loss_mask: float32 of the same shape."""


@dataclass(frozen=True)
class DataCoordinates:
    """Which data this rank reads.

    Args:
        dp_rank, dp_size: its place among the data-parallel replicas; ranks of one replica read the same samples.
        cp_rank, cp_size: its place along the sequence; the engine itself cuts the sequence.
        needs_data: False for a rank that neither embeds tokens nor computes the loss (a middle pipeline stage).
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
    """

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    skipped: bool = False
    reason: str = ""
    stop: bool = False


class Engine(Protocol):
    """Holds this rank's part of the model and the optimizer. Methods are collective: all ranks call them alike."""

    layout: ParallelLayout
    data: DataCoordinates
    flops_per_token: float
    content_metadata: dict[str, Any]
    """How the checkpoint's keys are to be read; saved with it."""

    def train_step(self, micro_batches: list[MicroBatch], step: int, *, stop: bool = False) -> StepResult:
        """One optimizer step (number `step`, from 0) on this rank's micro-batches ([] where it needs no data)."""
        ...

    def evaluate(self, batches: Iterable[list[MicroBatch]]) -> float:
        """Mean loss over the counting tokens of some global batches, with dropout off."""
        ...

    def sharded_state_dict(self, is_loading: bool = False) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def load_pretrained(self, folder: Path) -> None: ...

    def close(self) -> None:
        """Leave the process groups and free everything, also after a peer died. May be called twice."""
        ...
