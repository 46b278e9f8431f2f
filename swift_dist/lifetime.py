"""Processes that must not outlive the one that started them. Standard library only: the first import of a worker."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def end_with_parent(number: int = signal.SIGKILL, parent: int | None = None) -> None:
    """Have the kernel send this process a signal when its parent dies, by whatever means (Linux; elsewhere nothing).

    The kernel goes by the thread that started us: if that ends the signal comes, although the parent lives.

    Args:
        number: the signal.
        parent: process id of the parent. If it died before this call nothing would be sent: then the process ends here.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Be the parent that every orphan below this process falls back to, so that none escapes `end_family` (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_family(patience: float = 10.0) -> None:
    """SIGKILL everything below this process, orphans that fell back to it included, and wait until it is gone."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return  # no children: and so no grandchildren, which would have become children
        time.sleep(0.01)


def descendants(ancestor: int) -> list[int]:
    """Process ids below `ancestor`, as /proc has them now."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [ancestor]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found
