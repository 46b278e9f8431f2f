"""Which rank runs on which node, and which groups then talk across nodes. Pure arithmetic.

The rank order makes tensor-parallel neighbours consecutive, then context-parallel ones (and expert-parallel ones in
the expert grid), so a group stays inside a node exactly where the block of consecutive ranks that holds it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm

from swift_dist.parallel.layout import Axis, ParallelLayout


@dataclass(frozen=True)
class Place:
    """Where a rank runs: node index in the given list, and position among that node's ranks."""

    node: int
    local_rank: int


def place_ranks(layout: ParallelLayout, slots_per_node: Sequence[int]) -> tuple[Place, ...]:
    """A place for every rank, keeping TP groups, then CP and EP groups, inside a node where they fit.

    Ranks are dealt out in blocks of consecutive ranks: the largest of (TP x CP and EP x ETP together, TP x CP,
    EP x ETP, TP, 1) for which the nodes have room for all blocks. Blocks fill the nodes in the given order; a node's
    slots that do not fit a block stay empty.

    Args:
        layout: a valid layout.
        slots_per_node: how many ranks each node can take.

    Raises:
        ValueError: fewer slots than ranks.
    """
    if sum(slots_per_node) < layout.world_size:
        raise ValueError(f"{layout.world_size} ranks need as many slots, the nodes have {sum(slots_per_node)}")
    dense, expert = layout.tp * layout.cp, layout.expert_tp * layout.ep
    candidates = [lcm(dense, expert), max(dense, expert), min(dense, expert), layout.tp]
    blocks = [b for b in candidates if b % layout.tp == 0 and layout.world_size % b == 0]
    block = next((b for b in blocks if sum(n // b for n in slots_per_node) * b >= layout.world_size), 1)
    places: list[Place] = []
    for node, slots in enumerate(slots_per_node):
        usable = min(slots // block * block, layout.world_size - len(places))
        places.extend(Place(node, local) for local in range(usable))
    return tuple(places)


def crossing_groups(layout: ParallelLayout, places: Sequence[Place], axis: Axis) -> tuple[tuple[int, ...], ...]:
    """The groups along an axis whose ranks are not all on one node; empty: the axis never leaves a node."""
    return tuple(ranks for ranks in layout.groups(axis) if len({places[rank].node for rank in ranks}) > 1)
