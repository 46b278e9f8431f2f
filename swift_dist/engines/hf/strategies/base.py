"""What a strategy is: how weights, gradients and optimizer state are spread over the ranks.

Whatever a strategy does, the engine sees one thing: micro-batches add gradients up, `gradient_norm` is the norm of the
whole, `update` applies it. And a checkpoint is one thing, too: every tensor under its name in the model, wherever its
pieces lie. So a run goes on under another number of ranks, and under another strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from swift_dist.config import JobConfig


@dataclass(frozen=True)
class Setting:
    """What a strategy is given.

    Args:
        job: the job (``job.strategy``, ``job.train.precision``, ``job.train.recompute``, ``job.optimizer``).
        device: of this rank.
        group: the data-parallel ranks; None: all ranks (the default group).
        make_optimizer: from parameter groups (``params``, ``weight_decay``, ``lr_scale``, ``names``) to the optimizer.
        parameter_groups: from a module to such groups, of the parameters that learn.
        from_first_rank: only the first rank has the model's numbers, other ranks have it on the meta device
            (`_first_rank`).
    """

    job: JobConfig
    device: torch.device
    group: dist.ProcessGroup | None
    make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    parameter_groups: Callable[[torch.nn.Module], list[dict[str, Any]]]
    from_first_rank: bool = False


class Strategy(Protocol):
    """``STRATEGY`` of its file is a class with this interface, made as ``STRATEGY(model, setting)``. Collective: every
    rank calls every method alike. `model` holds the same whole weights on every rank (fp32, or frozen ones in the
    compute precision), on the CPU; with ``from_first_rank`` only the first one does.
    """

    module: torch.nn.Module
    """What to call for a forward pass."""
    loss_scale: float | None
    """fp16's dynamic loss scale of the step under way; None where gradients are not scaled."""

    def accumulate(self, is_last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; gradients need only be reduced within the last one's."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss` up. Gradients are the SUM over ranks and micro-batches, not their mean."""
        ...

    def gradient_norm(self) -> float:
        """Global 2-norm of the gradients, unscaled, before clipping; inf or nan where they are."""
        ...

    def update(self, lr: float, gradient_norm: float) -> None:
        """Clip to ``optimizer.clip_grad``, take the optimizer step at rate ``lr * lr_scale``, drop the gradients."""
        ...

    def skip(self) -> None:
        """Drop the gradients; weights and optimizer stay as they are."""
        ...

    def sharded_state(self, is_loading: bool) -> dict[str, Any]:
        """This rank's pieces as megatron-core ``ShardedTensor``s (`_state`): ``model.<name>`` of every weight of the
        optimizer (its fp32 master, whatever the model computes with) and of saved buffers, and
        ``optimizer.<state>.<name>`` (exp_avg, exp_avg_sq). Plain values stand under ``numbers``: ``counts`` (name ->
        {"step": updates of this weight}) and ``loss_scale`` (None, or `LossScale.state`). So any strategy reads what
        another one wrote."""
        ...

    def load_sharded_state(self, state: dict[str, Any]) -> None:
        """Take over what was loaded into ``sharded_state(is_loading=True)``."""
        ...

    def whole_weights(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole CPU tensor) of entries of the model's state dict, on rank 0; other ranks take part and get
        nothing. One at a time: no rank ever needs room for the whole model."""
        ...

    def held_bytes(self) -> dict[str, int]:
        """Bytes of ``parameters``, ``gradients`` (largest so far) and ``optimizer`` state that this rank holds."""
        ...

    def close(self) -> None:
        """Free everything. Never waits for a peer."""
        ...
