"""Processes of the gang without a rank: they import what a rank needs, and wait for one that is lost.

Warm spares stand ready (`cluster.spares`). One more is begun on the node of a rank that died, at once: by the time that
the survivors have found out and cleaned up, it has half of its imports behind it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from swift_dist.cluster.heartbeat import Beat

log = logging.getLogger(__name__)


@dataclass
class Process:
    """One actor: a rank's, or a spare's (rank None).

    Attributes:
        name: of its beat record; never used twice.
        warm: the pending call of a spare's imports.
    """

    name: str
    node: int
    actor: Any
    rank: int | None = None
    warm: Any = None
    host: str = ""

    @property
    def is_warm(self) -> bool:
        """Whether a spare has imported what it needs."""
        return self._imports() == "done"

    @property
    def is_dead(self) -> bool:
        """Whether a spare's imports have failed, or ended with its process."""
        return self._imports() == "failed"

    def _imports(self) -> Literal["under way", "done", "failed"]:
        import ray

        done, _ = ray.wait([self.warm], timeout=0)
        try:
            return "under way" if not done else "done" if ray.get(self.warm) is None else "failed"
        except ray.exceptions.RayError:
            return "failed"


class Spares:
    """Those that wait now.

    Args:
        wanted: how many are to stand ready on all nodes together.
        nnodes: nodes of the job.
        start: starts one on a node, which imports.
        end: ends some.
    """

    def __init__(
        self, wanted: int, nnodes: int, start: Callable[[int], Process], end: Callable[[Sequence[Process]], None]
    ) -> None:
        self._wanted, self._nnodes, self._start, self._end = wanted, nnodes, start, end
        self.waiting: list[Process] = []

    def keep(self, beats: Mapping[str, Beat], ranks: Sequence[Beat]) -> None:
        """Start missing ones once the ranks are stepping: before that their imports would only slow the start."""
        self.drop_dead(beats)
        missing = self._wanted - len(self.waiting)
        if missing > 0 and all(beat.median_step for beat in ranks):
            for _ in range(missing):
                counts = [self.on(node) for node in range(self._nnodes)]
                self.begin(counts.index(min(counts)))

    def begin(self, node: int) -> None:
        self.waiting.append(self._start(node))

    def on(self, node: int) -> int:
        """How many wait on a node."""
        return sum(spare.node == node for spare in self.waiting)

    def take(self, node: int) -> Process | None:
        """One of a node, a warm one if there is."""
        here = sorted((s for s in self.waiting if s.node == node), key=lambda spare: not spare.is_warm)
        if not here:
            return None
        self.waiting.remove(here[0])
        return here[0]

    def drop_dead(self, beats: Mapping[str, Beat]) -> None:
        """Forget those that were killed while they waited: nobody waits for them, so nobody else notices."""
        dead = [
            spare
            for spare in self.waiting
            if ((beat := beats.get(spare.name, Beat())).pid and beat.state in ("", "Z")) or spare.is_dead
        ]
        if dead:
            log.warning("%d warm spare(s) died while they waited", len(dead))
            self.waiting = [s for s in self.waiting if s not in dead]
            self._end(dead)

    def leave(self, node: int) -> None:
        """Forget those on a node that is lost."""
        self.waiting = [spare for spare in self.waiting if spare.node != node]
