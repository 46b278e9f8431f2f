"""Units to workers and facts back: two units in flight per worker, so that none idles and memory stays bounded."""

from __future__ import annotations

import logging
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol

from swift_dist.data.encoder import Recipe
from swift_dist.data.parts import PartFacts
from swift_dist.data.sources import SourceFile
from swift_dist.data.units import Stream, Unit
from swift_dist.data.work_process import Failure
from swift_dist.errors import RunError

logger = logging.getLogger(__name__)

_IN_FLIGHT = 2

UnitId = tuple[int, int]


class Worker(Protocol):
    """Encodes units, one after the other, in the order in which they were submitted."""

    def submit(self, unit: Unit) -> None: ...
    def result(self) -> PartFacts: ...
    def close(self) -> None: ...


def raise_failure(failure: Failure) -> None:
    if failure.kind == "disk full":
        raise RunError(
            f"the disk is full: {failure.message}", "free space and repeat the command: it goes on where it was"
        )
    raise RunError(failure.message if failure.kind == "file" else f"a worker failed:\n{failure.message}")


class LocalWorker:
    """A process on this machine. Dies with us, whatever ends us."""

    def __init__(self, recipe: Recipe) -> None:
        # One thread each: the processes are the parallelism. Threads of their own would only wait for each other.
        env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "swift_dist.data.work_process", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            start_new_session=True,  # Ctrl-C is for the parent, which ends the workers
        )
        assert self._process.stdin and self._process.stdout
        self._in, self._out = self._process.stdin, self._process.stdout
        self._send(recipe)

    def _send(self, message: Any) -> None:
        try:
            pickle.dump(message, self._in, protocol=pickle.HIGHEST_PROTOCOL)
            self._in.flush()
        except BrokenPipeError:
            self._died()

    def _died(self) -> None:
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        remedy = "repeat the command: it goes on where it was"
        if code == -9:
            remedy += "; if memory ran out, use fewer --workers"
        raise RunError(f"a worker process {how}", remedy)

    def submit(self, unit: Unit) -> None:
        self._send(unit)

    def result(self) -> PartFacts:
        try:
            facts, failure = pickle.load(self._out)
        except (EOFError, pickle.UnpicklingError):
            self._died()
        if failure is not None:
            raise_failure(failure)
        return facts

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._in, self._out):
            with suppress(OSError):
                stream.close()


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


def encode_all(work: Work, workers: Sequence[Worker], seen: Callable[[PartFacts | None], None]) -> None:
    """Encode everything. Ends the workers, also when it fails.

    Args:
        seen: called in this thread with the facts of each finished unit, and with None about every half second.

    Raises:
        RunError: a unit failed or a worker died. KeyboardInterrupt: passed on.
    """
    results: queue.Queue[PartFacts | BaseException | None] = queue.Queue()
    stop = threading.Event()

    def feed(worker: Worker) -> None:
        try:
            mine: list[Stream] = []
            in_flight, more = 0, True
            while not stop.is_set() and (more or in_flight):
                unit = work.take(mine) if more else None
                more = unit is not None
                if unit is not None:
                    worker.submit(unit)
                    in_flight += 1
                if in_flight and (not more or in_flight == _IN_FLIGHT):
                    results.put(worker.result())
                    in_flight -= 1
            results.put(None)
        except BaseException as error:
            results.put(error)

    threads = [threading.Thread(target=feed, args=(worker,), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        running = len(threads)
        while running:
            try:
                result = results.get(timeout=0.5)
            except queue.Empty:
                seen(None)
                continue
            if isinstance(result, BaseException):
                raise result
            if result is None:
                running -= 1
            else:
                seen(result)
    finally:
        stop.set()
        for worker in workers:
            worker.close()
        for thread in threads:
            thread.join(timeout=10)
        work.close()
