"""Which spare takes a lost rank's place, and which are missing."""

from __future__ import annotations

from dataclasses import dataclass

from swift_dist.cluster.heartbeat import Beat
from swift_dist.cluster.spares import Process, Spares


@dataclass
class Imported(Process):
    done: bool = False

    dead: bool = False

    @property
    def is_warm(self) -> bool:
        return self.done

    @property
    def is_dead(self) -> bool:
        return self.dead


class House:
    def __init__(self, wanted: int = 0, nnodes: int = 2) -> None:
        self.ended: list[str] = []
        self.started = 0
        self.spares = Spares(wanted, nnodes, self.start, lambda gone: self.ended.extend(p.name for p in gone))

    def start(self, node: int) -> Imported:
        self.started += 1
        return Imported(f"p{self.started}", node, None)


def test_a_warm_one_of_the_node_goes_before_one_that_still_imports():
    house = House()
    for node in (0, 1, 1):
        house.spares.begin(node)
    house.spares.waiting[2].done = True  # type: ignore[attr-defined]
    assert [house.spares.take(1).name, house.spares.take(1).name, house.spares.take(1)] == ["p3", "p2", None]  # type: ignore[union-attr]
    assert house.spares.on(0) == 1 and house.spares.on(1) == 0


def test_missing_ones_are_spread_over_the_nodes_once_the_ranks_step():
    house, stepping = House(wanted=3), Beat(median_step=0.1)
    house.spares.keep({}, [stepping, Beat()])
    assert house.started == 0
    house.spares.keep({}, [stepping, stepping])
    assert sorted(p.node for p in house.spares.waiting) == [0, 0, 1]
    house.spares.leave(0)
    house.spares.keep({}, [stepping])
    assert house.started == 5 and house.spares.on(0) == house.spares.on(1) + 1


def test_one_that_was_killed_while_it_waited_is_ended_and_forgotten():
    house = House()
    house.spares.begin(0)
    house.spares.begin(1)
    house.spares.drop_dead({"p1": Beat(pid=7, state="Z"), "p2": Beat(pid=8, state="S")})
    assert house.ended == ["p1"] and [p.name for p in house.spares.waiting] == ["p2"]
    house.spares.waiting[0].dead = True  # type: ignore[attr-defined]  # before it was heard of as a process
    house.spares.drop_dead({})
    assert house.ended == ["p1", "p2"] and house.spares.take(1) is None
