"""Processes that must not outlive the one that started them. Standard library only: the first import of a worker."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


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
