"""The canonical state: every tensor of a checkpoint under its name in the model, wherever its pieces lie.

A piece is a box of the whole tensor. A replicated tensor is one box, a DTensor's shard is one, and a flat range (as
ZeRO cuts) is a few. All of them are megatron-core ``ShardedTensor``s, so `swift_dist.checkpoint` writes them from any
strategy and reads them into any other, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from swift_dist.checkpoint.boxes import boxes
from swift_dist.errors import RunError

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

Pieces = dict[str, "ShardedTensor"]
"""This rank's pieces of tensors; the dict's own keys only tell them apart."""

Counts = dict[str, dict[str, float]]
"""Name of a weight -> what its optimizer state counts (``step``)."""


def replicated(key: str, tensor: torch.Tensor, replica: int) -> Pieces:
    """A tensor that every rank holds whole.

    Args:
        key: in the checkpoint.
        tensor: shares its memory with the piece: a load writes into it.
        replica: this rank's number among the holders.
    """
    shape = tuple(tensor.shape)
    return {key: _piece(key, tensor, shape, (0,) * len(shape), replica, is_whole=True)}


def from_dtensor(key: str, tensor: DTensor) -> Pieces:
    """This rank's shard of a DTensor, whatever its placements: uneven and empty shards, replicas of shards (HSDP).

    Raises:
        RunError: a placement that is neither a shard nor a replica (partial sums).
    """
    mesh, placements = tensor.device_mesh, tensor.placements
    if not all(placement.is_shard() or placement.is_replicate() for placement in placements):
        raise RunError(f"{key} is placed as {placements}, of which no checkpoint can be made", "report it as a defect")
    size, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    if 0 in size:
        return {}
    replica, coordinate = 0, mesh.get_coordinate()
    assert coordinate is not None, "the rank is part of the mesh"
    for place, axis, placement in zip(coordinate, range(mesh.ndim), placements, strict=True):
        if placement.is_replicate():
            replica = replica * mesh.size(axis) + place
    local = tensor.to_local()
    assert tuple(local.shape) == tuple(size), (key, local.shape, size)
    return {key: _piece(key, local, tuple(tensor.shape), tuple(offset), replica)}


def from_flat_range(
    key: str, global_shape: tuple[int, ...], flat: torch.Tensor, start: int, replica: int = 0
) -> Pieces:
    """The numbers ``[start, start + flat.numel())`` of a tensor in row-major order.

    Args:
        key: in the checkpoint.
        global_shape: of the whole tensor.
        flat: one-dimensional and contiguous; shares its memory with the pieces. May be empty.
        start: where in the whole tensor it begins.
        replica: this rank's number among those that hold this very range.
    """
    assert flat.dim() == 1 and flat.is_contiguous(), (key, flat.shape, flat.stride())
    found: Pieces = {}
    at = 0
    for offset, size in boxes(tuple(global_shape), start, start + flat.numel()):
        count = torch.Size(size).numel()
        piece = _piece(key, flat.detach()[at : at + count].view(size), tuple(global_shape), offset, replica)
        found[f"{key}{list(offset)}"] = piece
        at += count
    return found


def _piece(
    key: str,
    tensor: torch.Tensor,
    global_shape: tuple[int, ...],
    offset: tuple[int, ...],
    replica: int,
    is_whole: bool = False,
) -> ShardedTensor:
    from swift_dist.engines.megatron import cpu_shim

    cpu_shim.apply()
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    return ShardedTensor(
        key=key,
        data=tensor.detach(),
        dtype=tensor.dtype,
        local_shape=tuple(tensor.shape),
        global_shape=global_shape,
        global_offset=offset,
        axis_fragmentations=(1,) * len(global_shape) if is_whole else None,  # None: no regular grid
        replica_id=replica,
    )


def pieces_of(key: str, tensor: torch.Tensor, replica: int) -> Pieces:
    """`from_dtensor` of a DTensor, else `replicated`."""
    return from_dtensor(key, tensor) if isinstance(tensor, DTensor) else replicated(key, tensor, replica)


def saved_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the model's state (running statistics, not tables that it computes), by name."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


class OptimizedWeights:
    """The weights of an optimizer, their state in it, and the model's buffers, as one canonical state.

    What an optimizer keeps for a weight is of its shape (moments), a count (``step``), or, where the weight is whole on
    every rank, a tensor of another shape (GaLore's projections).

    Args:
        model: names come from its ``named_parameters``.
        optimizer: over some of those.
        replica: this rank's number among those that hold the same, where tensors are no DTensors.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, replica: int) -> None:
        self.optimizer, self.replica = optimizer, replica
        ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.weights: dict[str, torch.Tensor] = {n: p for n, p in model.named_parameters() if id(p) in ours}
        assert len(self.weights) == len(ours), "every weight of the optimizer has a name in the model"
        self.buffers = saved_buffers(model)

    def collect(self, is_loading: bool) -> dict[str, Any]:
        """``model`` and ``optimizer``: pieces that share memory with weights and state; ``counts``: plain numbers.

        Weights that were never updated have no state. Its zeros are made here, so that the same things are in every
        checkpoint: for a load they stay, for a save they are only in what is returned.
        """
        made = self._make_missing_state()
        model: Pieces = {}
        for name, tensor in (*self.weights.items(), *self.buffers.items()):
            model |= pieces_of(f"model.{name}", tensor, self.replica)
        optimizer: Pieces = {}
        for name, weight in self.weights.items():
            for entry, tensor in self._tensors(weight):
                optimizer |= pieces_of(f"optimizer.{entry}.{name}", tensor, self.replica)
        counts = self.counts()
        if not is_loading:
            self._forget_state(made)
        return {"model": model, "optimizer": optimizer, "counts": counts}

    @torch.no_grad()
    def take_over(self, loaded: Mapping[str, Any], counts: Counts) -> None:
        """What was loaded into ``collect(is_loading=True)``.

        Raises:
            RunError: the checkpoint's counts are of other weights.
        """
        if counts.keys() != self.weights.keys():
            other = sorted(counts.keys() ^ self.weights.keys())[0]
            raise RunError(f"the checkpoint and the job do not agree on whether {other} learns", "use the same tuner")
        wanted = self.collect(is_loading=True)
        for part in ("model", "optimizer"):
            for key, piece in wanted[part].items():
                tensor = loaded[part][key]
                if tensor.data_ptr() != piece.data.data_ptr():  # read in place, as a rule
                    piece.data.copy_(tensor)
        for name, weight in self.weights.items():
            if not any(counts[name].values()):
                self._forget_state([weight])
                continue
            state = self.optimizer.state[weight]
            for entry, value in counts[name].items():
                if torch.is_tensor(state.get(entry)):
                    state[entry].fill_(value)
                else:
                    state[entry] = type(state.get(entry, 0))(value)

    def counts(self) -> Counts:
        """What each weight's state counts."""
        return {
            name: {
                entry: float(value)
                for entry, value in self.optimizer.state.get(weight, {}).items()
                if _is_count(entry, value, weight)
            }
            for name, weight in self.weights.items()
        }

    def _tensors(self, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        for entry, value in sorted(self.optimizer.state.get(weight, {}).items()):
            if value is None or _is_count(entry, value, weight):
                continue
            if isinstance(weight, DTensor) and not isinstance(value, DTensor):
                raise RunError(
                    f"the optimizer's {entry} of a sharded weight is not sharded", "use strategy ddp with it"
                )
            yield entry, value

    def _forget_state(self, weights: list[torch.Tensor]) -> None:
        for weight in weights:
            self.optimizer.state.pop(weight, None)

    @torch.no_grad()
    def _make_missing_state(self) -> list[torch.Tensor]:
        """Let the optimizer make the state that it makes in its first step: take one with gradients and a rate of 0,
        for these weights only, as `torch.distributed.checkpoint.state_dict` does."""
        missing = [weight for weight in self.weights.values() if not self.optimizer.state.get(weight)]
        if not missing:
            return []
        gradients = [(weight, weight.grad) for weight in self.weights.values()]
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for weight in self.weights.values():
            weight.grad = None
        for weight in missing:
            weight.grad = torch.zeros_like(weight)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        try:
            self.optimizer.step()
        finally:
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            for weight, gradient in gradients:
                weight.grad = gradient
        for weight in missing:
            for entry, value in self.optimizer.state.get(weight, {}).items():
                if _is_count(entry, value, weight):
                    self.optimizer.state[weight][entry] = value * 0
        return missing


def _is_count(entry: str, value: Any, weight: torch.Tensor) -> bool:
    if not torch.is_tensor(value):
        return isinstance(value, (int, float))
    return entry == "step" or (value.dim() == 0 and weight.dim() > 0)
