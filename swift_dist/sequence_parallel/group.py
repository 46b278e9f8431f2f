"""The ranks that share rows: their process groups, and what attention is told of the row under way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from swift_dist.sequence_parallel.degrees import Degrees
from swift_dist.sequence_parallel.row import Row


@dataclass(frozen=True)
class SharingRanks:
    """This rank's place among those that share its rows.

    Args:
        degrees: of each group.
        rank: of this process in its group.
        group: all ranks that share a row.
        ulysses, ring: its ranks that exchange heads, and those that pass keys on; None for a degree of 1.
    """

    degrees: Degrees
    rank: int
    group: dist.ProcessGroup
    ulysses: dist.ProcessGroup | None
    ring: dist.ProcessGroup | None

    @property
    def ulysses_rank(self) -> int:
        return self.rank % self.degrees.ulysses

    @property
    def ring_rank(self) -> int:
        return self.rank // self.degrees.ulysses


@dataclass(frozen=True, eq=False)
class SharedRow:
    """What each attention layer is given with its keyword arguments."""

    ranks: SharingRanks
    row: Row

    @property
    def pieces(self) -> tuple[int, ...]:
        """Tokens of each Ulysses rank."""
        return self.row.pieces(self.ranks.ring_rank)


def make_groups(degrees: Degrees, rank: int, world_size: int) -> SharingRanks:
    """Of each run of `degrees.size` consecutive ranks. Collective: every rank of the world calls it.

    Args:
        rank, world_size: of the world; a multiple of the degrees' size.
    """
    size, ulysses, ring = degrees.size, degrees.ulysses, degrees.ring
    assert world_size % size == 0
    starts = range(0, world_size, size)
    wholes = [list(range(start, start + size)) for start in starts]
    neighbours = [whole[k * ulysses : (k + 1) * ulysses] for whole in wholes for k in range(ring)]
    across = [whole[k::ulysses] for whole in wholes for k in range(ulysses)]
    whole = _mine(wholes, rank)
    assert whole is not None
    return SharingRanks(
        degrees,
        rank % size,
        whole,
        _mine(neighbours, rank) if ulysses > 1 else None,
        _mine(across, rank) if ring > 1 else None,
    )


def _mine(groups: list[list[int]], rank: int) -> dist.ProcessGroup | None:
    """Make all groups, keep the one that this rank is in."""
    kept: Any = None
    for ranks in groups:
        made = dist.new_group(ranks)
        if rank in ranks:
            kept = made
    return kept


def gather_tokens(
    values: torch.Tensor, counts: list[int], order: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """Numbers of each rank's tokens, to all ranks, in the order of the row.

    Backward takes this rank's part of the gradient and nothing else: each rank computes the same loss from the same
    numbers, so the ranks' gradients of a weight, each of its own tokens, add up to the whole one.

    Args:
        values: floating [counts[rank]].
        counts: how many each rank has.
        order: int64 [sum of counts], on values' device: the place in the row's order of what the ranks hold, rank after
            rank.

    Returns:
        [sum of counts].
    """
    result: torch.Tensor = _GatherTokens.apply(values, tuple(counts), order, group)
    return result


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, counts: tuple[int, ...], order: torch.Tensor, group: dist.ProcessGroup
    ) -> torch.Tensor:
        rank = dist.get_rank(group)
        padded = values.new_zeros(max(counts))
        padded[: counts[rank]] = values
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded, group=group)
        held = torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])
        ctx.mine = order[sum(counts[:rank]) : sum(counts[: rank + 1])]
        return torch.empty_like(held).index_copy_(0, order, held)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return gradient.index_select(0, ctx.mine), None, None, None
