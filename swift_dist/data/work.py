"""Which unit is encoded next, and by whom."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence

from swift_dist.data.sources import SourceFile
from swift_dist.data.units import Stream, Unit

UnitId = tuple[int, int]


class Work:
    """Hands units to the threads of the workers: compressed files first, one a worker, then the rest.

    Args:
        units: known units; files: compressed files and what ends their documents; size: of a unit.
        done: ids of units that are finished already.
    """

    def __init__(
        self, units: Sequence[Unit], files: Sequence[tuple[SourceFile, str]], size: int, done: Collection[UnitId]
    ) -> None:
        self._units: Iterator[Unit] = iter([unit for unit in units if unit.id not in done])
        self._files, self._size, self._done = deque(files), size, done
        self._streams: list[Stream] = []
        self._lock = threading.Lock()

    def take(self, mine: list[Stream]) -> Unit | None:
        """The next unit for a worker that keeps its own open file in `mine`; None when nothing is left to start."""
        while True:
            if mine and (unit := self._next(mine[0])):
                return unit
            mine.clear()
            with self._lock:
                if self._files:
                    file, kind = self._files.popleft()
                    mine.append(Stream(file, kind, self._size))
                    self._streams.append(mine[0])
                    continue
                if (unit := next(self._units, None)) is not None:
                    return unit
                others = list(self._streams)
            for stream in others:
                if unit := self._next(stream):
                    return unit
            return None

    def _next(self, stream: Stream) -> Unit | None:
        while (unit := stream.next()) is not None:
            if unit.id not in self._done:
                return unit
        return None

    def close(self) -> None:
        for stream in self._streams:
            stream.close()
