"""Units to workers and results back: two units in flight per worker, so that none idles and memory stays bounded."""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from swift_dist.errors import RunError
from swift_dist.workers.process import AGAIN, ONE_THREAD, send

_IN_FLIGHT = 2

Take = Callable[[list], Any | None]


class Task(Protocol):
    """What to do, pickled to every worker: an instance of a class that the worker can import (not of ``__main__``)."""

    def start(self) -> Callable[[Any], Any]:
        """Called once in the worker; returns the function that does a unit. What is heavy is imported here."""
        ...


class Worker(Protocol):
    """Does units, one after the other, in the order in which they were submitted."""

    def submit(self, unit: Any) -> None: ...
    def result(self) -> Any: ...
    def close(self) -> None: ...


class LocalWorker:
    """A process on this machine. Dies with us, whatever ends us, and with the thread that made it.

    Raises (`submit` and `result` too):
        JobError, RunError: as the task raised it, or made of what it raised (`process.as_error`); the process died.
    """

    def __init__(self, task: Task) -> None:
        message = pickle.dumps(task, protocol=pickle.HIGHEST_PROTOCOL)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "swift_dist.workers.process", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **ONE_THREAD},
            start_new_session=True,  # Ctrl-C is for the parent, which ends the workers
        )
        assert self._process.stdin and self._process.stdout
        self._in, self._out = self._process.stdin, self._process.stdout
        try:
            self._send(message)
        except BaseException:
            self.close()
            raise

    def _send(self, message: bytes) -> None:
        try:
            send(message, self._in)
        except BrokenPipeError:
            self._died()

    def _died(self) -> NoReturn:
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        remedy = AGAIN
        if code == -9:
            remedy += "; if memory ran out, use fewer --workers"
        raise RunError(f"a worker process {how}", remedy)

    def submit(self, unit: Any) -> None:
        self._send(pickle.dumps(unit, protocol=pickle.HIGHEST_PROTOCOL))

    def result(self) -> Any:
        try:
            message = pickle.load(self._out)
        except (EOFError, pickle.UnpicklingError):
            self._died()
        result, error = pickle.loads(message)
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._in, self._out):
            with suppress(OSError):
                stream.close()


def start_local(task: Task, count: int) -> list[LocalWorker]:
    """So many processes, or none: those begun are ended if one cannot be started."""
    workers: list[LocalWorker] = []
    try:
        for _ in range(count):
            workers.append(LocalWorker(task))
    except BaseException:
        for worker in workers:
            worker.close()
        raise
    return workers


def from_queue(units: Iterable) -> Take:
    """`take` of `run_all` for units that any worker may do: each goes to the one that asks next."""
    iterator, lock = iter(units), threading.Lock()

    def take(mine: list) -> Any | None:
        with lock:
            return next(iterator, None)

    return take


@dataclass(frozen=True)
class _Ended:
    """A feeder's last word."""

    error: BaseException | None = None


class _Feeders:
    """One thread a worker, which hands it units and collects its results."""

    def __init__(self, take: Take, workers: Sequence[Worker], results: queue.Queue) -> None:
        self._take, self._workers, self._results = take, workers, results
        self._stop = threading.Event()
        self._begun: set[Worker] = set()
        self.threads = [threading.Thread(target=self._run, args=(worker,), daemon=True) for worker in workers]

    def _run(self, worker: Worker) -> None:
        try:
            self._feed(worker)
        except BaseException as error:
            self._results.put(_Ended(error))
        else:
            self._results.put(_Ended())

    def _feed(self, worker: Worker) -> None:
        mine: list = []
        in_flight, more = 0, True
        while not self._stop.is_set() and (more or in_flight):
            unit = self._take(mine) if more else None
            self._begun.add(worker)
            more = unit is not None
            if unit is not None:
                worker.submit(unit)
                in_flight += 1
            if in_flight and (not more or in_flight >= self._limit()):
                self._results.put(worker.result())
                in_flight -= 1

    def _limit(self) -> int:
        """Nobody gets a second unit while somebody waits for a first: there may be no more units than workers."""
        return _IN_FLIGHT if len(self._begun) >= len(self._workers) else 1

    def stop(self) -> None:
        self._stop.set()
        for worker in self._workers:
            worker.close()
        for thread in self.threads:
            if thread.ident is not None:
                thread.join(timeout=10)


def run_all(take: Take, workers: Sequence[Worker], seen: Callable[[Any | None], None]) -> None:
    """Do all units. Ends the workers, also when it fails.

    Args:
        take: the next unit, or None when nothing is left to start. Called in one thread a worker, with a list that is
            that thread's own from call to call.
        seen: called in this thread with the result of each finished unit, and with None about every half second.

    Raises:
        JobError, RunError: a unit failed or a worker died. KeyboardInterrupt: passed on, as what `seen` raises.
    """
    results: queue.Queue[Any] = queue.Queue()
    feeders = _Feeders(take, workers, results)
    try:
        for thread in feeders.threads:
            thread.start()
        running = len(workers)
        while running:
            try:
                result = results.get(timeout=0.5)
            except queue.Empty:
                seen(None)
                continue
            if not isinstance(result, _Ended):
                seen(result)
            elif result.error is not None:
                raise result.error
            else:
                running -= 1
    finally:
        feeders.stop()
