"""A thread that reads the next batches while the current one is trained on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Batch = TypeVar("Batch")

_WAIT_SECONDS = 1.0


class Prefetcher(Generic[Batch]):
    """Calls `read(step)` for step, step + 1, ... ahead of the caller, at most `depth` batches.

    Asking for another step than the next one (a run that went back to its checkpoint) starts over there. An exception
    of `read` is raised by the `get` of its step.

    Args:
        read: reads one batch; called from one background thread, or by `get` itself where depth is 0.
        depth: batches held ready.
        end: step at which reading stops, or None.
    """

    def __init__(self, read: Callable[[int], Batch], depth: int, end: int | None = None) -> None:
        self._read, self._depth, self._end = read, depth, end
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._ready: queue.Queue[tuple[Batch | None, BaseException | None]] = queue.Queue(max(1, depth))
        self._next = -1

    def get(self, step: int, waiting: Callable[[], None] | None = None) -> Batch:
        """The batch of `step`. `waiting` is called about every second until it is there (not where depth is 0)."""
        if self._depth == 0 or (self._end is not None and step >= self._end):
            return self._read(step)
        if self._thread is None or step != self._next:
            self._start(step)
        while True:
            try:
                batch, error = self._ready.get(timeout=_WAIT_SECONDS)
                break
            except queue.Empty:
                if waiting is not None:
                    waiting()
        self._next = step + 1
        if error is not None:
            self.close()
            raise error
        assert batch is not None
        return batch

    def _start(self, step: int) -> None:
        self.close()
        self._stop, self._ready = threading.Event(), queue.Queue(self._depth)
        self._next = step
        self._thread = threading.Thread(
            target=self._run, args=(step, self._stop, self._ready), name="data-prefetch", daemon=True
        )
        self._thread.start()

    def _run(self, step: int, stop: threading.Event, ready: queue.Queue) -> None:
        while not stop.is_set() and (self._end is None or step < self._end):
            batch = error = None
            try:
                batch = self._read(step)
            except BaseException as caught:
                error = caught
            while not stop.is_set():
                try:
                    ready.put((batch, error), timeout=0.1)
                    break
                except queue.Full:
                    continue
            if error is not None:
                return
            step += 1

    def close(self) -> None:
        """Stop the thread and wait for it. May be called twice; a later `get` starts it again."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
