"""A worker process: units in on stdin, results out on stdout, until stdin ends.

Started as ``python -m swift_dist.workers.process PARENT``. First comes the task, then units; each is answered by
``(result, None)`` or ``(None, error)``. A message is a pickle inside a pickle: it has arrived whole before anything is
imported for it, so one that cannot be made or understood is an error of its unit and the next one still has its place.
"""

from __future__ import annotations

import errno
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

from swift_dist.errors import JobError, RunError
from swift_dist.lifetime import end_with_parent

if TYPE_CHECKING:
    from swift_dist.workers.pool import Task

AGAIN = "repeat the command: it goes on where it was"

# One thread each: the processes are the parallelism. Threads of their own would only wait for each other.
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

Answer = tuple[Any, JobError | RunError | None]


def as_error(error: Exception) -> JobError | RunError:
    """What a worker's exception is to the user of the command: it pickles, and no library is needed to read it."""
    if isinstance(error, (JobError, RunError)):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"the disk is full: {error}", f"free space and {AGAIN}")
    if isinstance(error, OSError):
        return RunError(str(error))
    return RunError(f"a worker failed:\n{''.join(traceback.format_exception(error))}")


class Doer:
    """A task in its worker. Never raises: a task that cannot start fails every unit with the reason."""

    def __init__(self, start: Callable[[], Callable[[Any], Any]]) -> None:
        self._error: JobError | RunError | None = None
        try:
            self._do = start()
        except Exception as error:
            self._error = as_error(error)

    def answer(self, unit: Any) -> Answer:
        if self._error is not None:
            return None, self._error
        try:
            return self._do(unit), None
        except Exception as error:
            return None, as_error(error)


def send(message: bytes, stream: IO[bytes]) -> None:
    """Hand over what `pickle.dumps` made of a message.

    Raises:
        BrokenPipeError: nobody reads.
    """
    pickle.dump(message, stream, protocol=pickle.HIGHEST_PROTOCOL)
    stream.flush()


def _load(stream: IO[bytes]) -> Answer | None:
    """The next message, or why it cannot be understood. None at the end."""
    try:
        message = pickle.load(stream)
    except (EOFError, pickle.UnpicklingError):
        return None
    try:
        return pickle.loads(message), None
    except Exception as error:
        return None, as_error(error)


def _receive(stream: IO[bytes], units: queue.Queue[Answer | None]) -> None:
    """Take units off the pipe while one is worked on, so that the parent never waits to hand one over."""
    while (message := _load(stream)) is not None:
        units.put(message)
        del message  # it may be large, and the next one may be long in coming
    units.put(None)


def _dumps(answer: Answer) -> bytes:
    try:
        return pickle.dumps(answer, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        return pickle.dumps((None, as_error(error)))


def _start(message: Answer) -> Callable[[Any], Any]:
    task, error = message
    if error is not None:
        raise error
    started: Task = task
    return started.start()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    end_with_parent(parent=int(sys.argv[1]))
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no reply
    task = _load(sys.stdin.buffer)
    if task is None:
        return
    doer = Doer(lambda: _start(task))
    units: queue.Queue[Answer | None] = queue.Queue()
    threading.Thread(target=_receive, args=(sys.stdin.buffer, units), daemon=True).start()
    while (message := units.get()) is not None:
        unit, error = message
        del message
        send(_dumps((None, error) if error is not None else doer.answer(unit)), replies)
        del unit


if __name__ == "__main__":
    main()
