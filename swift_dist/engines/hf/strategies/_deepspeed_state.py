"""DeepSpeed's share of a rank as the canonical state, and back.

A weight's number in a checkpoint is its fp32 master, so the state of a bf16 run is also that of an fp32 run, of other
stages and of strategies whose weights are their own masters.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch

from swift_dist.engines.hf.strategies._deepspeed_shards import Shards
from swift_dist.engines.hf.strategies._state import (
    Counts,
    OptimizedWeights,
    Pieces,
    from_flat_range,
    replicated,
    saved_buffers,
)
from swift_dist.errors import RunError

log = logging.getLogger(__name__)


class ShardedWeights:
    """Masters, moments and buffers of this rank; the same interface as `OptimizedWeights`, which serves stage 0.

    Args:
        model: whose buffers are saved.
        shards: where DeepSpeed keeps the rest.
        learning: names of the weights that learn, on every rank.
        rank: of the data-parallel group.
    """

    def __init__(self, model: torch.nn.Module, shards: Shards, learning: list[str], rank: int) -> None:
        self.shards, self.learning, self.rank = shards, learning, rank
        self.buffers = saved_buffers(model)

    def collect(self, is_loading: bool) -> dict[str, Any]:
        """``model`` and ``optimizer``: pieces that share memory with masters and moments (copies of those that lie on a
        disk); ``counts``: plain numbers."""
        found: dict[str, Any] = {"model": self._buffer_pieces(), "optimizer": {}, "counts": self.counts()}
        for part, pieces in self._pieces(changes=False):
            found[part] |= pieces
        return found

    @torch.no_grad()
    def take_over(self, loaded: Mapping[str, Any], counts: Counts) -> None:
        """What was loaded into ``collect(is_loading=True)``. Collective: the weights that the model computes with are
        made anew from the masters.

        Raises:
            RunError: the checkpoint's counts are of other weights.
        """
        if counts.keys() != set(self.learning):
            other = sorted(counts.keys() ^ set(self.learning))[0]
            raise RunError(f"the checkpoint and the job do not agree on whether {other} learns", "use the same tuner")
        # one after the other: what lies on a disk is in memory only until the next one is asked for
        for part, pieces in chain([("model", self._buffer_pieces())], self._pieces(changes=True)):
            for key, piece in pieces.items():
                tensor = loaded[part][key]
                if tensor.data_ptr() != piece.data.data_ptr():  # read in place, as a rule
                    piece.data.copy_(tensor)
        self.shards.set_updates(_common_count(counts))
        self.shards.refresh()

    def counts(self) -> Counts:
        """ZeRO updates all weights together, so they have one count."""
        number = self.shards.updates()
        return {name: {"step": float(number)} if self.shards.counts_updates() else {} for name in self.learning}

    def _buffer_pieces(self) -> Pieces:
        found: Pieces = {}
        for name, buffer in self.buffers.items():
            found |= replicated(f"model.{name}", buffer, self.rank)
        return found

    def _pieces(self, *, changes: bool) -> Iterator[tuple[str, Pieces]]:
        self.shards.make_state()
        for number, flat in enumerate(self.shards.flats):
            with self.shards.resident(number, changes=changes) as is_swapped:
                tensors = {"model": flat} | {f"optimizer.{k}": v for k, v in self.shards.state(number).items()}
                for piece in (piece for piece in self.shards.pieces if piece.flat == number):
                    for prefix, tensor in tensors.items():
                        held = piece.of(tensor)
                        held = held.clone() if is_swapped and not changes else held
                        key = f"{prefix}.{piece.name}"
                        yield prefix.partition(".")[0], from_flat_range(key, tuple(piece.shape), held, piece.start)


def _common_count(counts: Counts) -> int:
    """The one count of all weights, where a strategy counted them one by one."""
    found = {int(values.get("step", 0)) for values in counts.values()}
    if len(found) > 1:
        log.warning("weights had %d to %d updates; ZeRO goes on with one count, the larger", min(found), max(found))
    return max(found)


def weights_of(
    model: torch.nn.Module, shards: Shards, optimizer: torch.optim.Optimizer, learning: list[str], rank: int
) -> ShardedWeights | OptimizedWeights:
    """What fits the stage."""
    if shards.is_replicated:
        return OptimizedWeights(model, optimizer, rank)
    return ShardedWeights(model, shards, learning, rank)
