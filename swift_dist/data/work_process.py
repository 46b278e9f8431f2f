"""A worker process of `data prepare`: units in on stdin, facts out on stdout, until stdin ends.

Started as ``python -m swift_dist.data.work_process``. Messages are pickles between a process and its own child: first
the recipe, then units; each is answered by ``(facts, None)`` or ``(None, Failure)``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from swift_dist.data.parts import PartFacts


@dataclass(frozen=True)
class Failure:
    """Why a unit could not be encoded: `kind` is "disk full", "file" (an OSError) or "bug"."""

    kind: str
    message: str


def describe(error: Exception) -> Failure:
    if isinstance(error, OSError):
        kind = "disk full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "file"
        return Failure(kind, str(error))
    return Failure("bug", traceback.format_exc())


def _die_with_parent(parent: int) -> None:
    """Let the kernel end this process when its parent dies by whatever means (Linux; elsewhere stdin's end does)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def _receive(stream: BinaryIO, units: queue.Queue) -> None:
    """Take units off the pipe while one is encoded, so that the parent never waits to hand one over."""
    try:
        while True:
            units.put(pickle.load(stream))
    except (EOFError, pickle.UnpicklingError):
        units.put(None)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    _die_with_parent(int(sys.argv[1]))
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no reply
    from swift_dist.data.encoder import Encoder

    encoder = Encoder(pickle.load(sys.stdin.buffer))
    units: queue.Queue = queue.Queue()
    threading.Thread(target=_receive, args=(sys.stdin.buffer, units), daemon=True).start()
    while (unit := units.get()) is not None:
        reply: tuple[PartFacts | None, Failure | None]
        try:
            reply = (encoder.encode(unit), None)
        except Exception as error:
            reply = (None, describe(error))
        pickle.dump(reply, replies, protocol=pickle.HIGHEST_PROTOCOL)
        replies.flush()


if __name__ == "__main__":
    # Under its own name, so that what it pickles is found by the parent.
    from swift_dist.data.work_process import main as run

    run()
