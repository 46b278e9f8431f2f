"""Ctrl-C and SIGTERM in the driver: first a request to checkpoint and end, the second time an end at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from swift_dist.errors import EXIT_INTERRUPTED

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Counts interrupts. Outside `graceful` the first one raises KeyboardInterrupt; inside, the owner asks.

    Nothing is raised while what the first one began is under way: clean-up is not interrupted half-way. The fifth ends
    the process on the spot (the kernel then ends what it started).
    """

    def __init__(self) -> None:
        self.count = 0
        self.graceful = False
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether the run is to checkpoint and end."""
        return self.count > 0

    @property
    def insistent(self) -> bool:
        """Whether it is to end at once."""
        return self.count > 1

    def install(self) -> None:
        """Take the signals (again: libraries such as Ray set handlers of their own). Main thread only, else nothing."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                previous = signal.signal(number, self._handle)
                self._previous.setdefault(number, previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count >= 5:
            os._exit(EXIT_INTERRUPTED)
        if not self.graceful and self.count == 1:
            raise KeyboardInterrupt

    def __enter__(self) -> Interrupts:
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}
        if self.requested and error is not None and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error  # compiled code, such as Ray's, turns the one into the other
