"""Ctrl-C and SIGTERM in the driver: first a request to checkpoint and end, the second time an end at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Counts interrupts. Outside `graceful` one raises KeyboardInterrupt at once, as does the second one inside."""

    def __init__(self) -> None:
        self.count = 0
        self.graceful = False
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self.count > 0

    def install(self) -> None:
        """Take the signals (again: libraries such as Ray set handlers of their own). Main thread only, else nothing."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                previous = signal.signal(number, self._handle)
                self._previous.setdefault(number, previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if not self.graceful or self.count > 1:
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
