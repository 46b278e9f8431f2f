"""What the driver notes in the run folder about its gang, and where the time of a start went."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from swift_dist.cluster.failures import Failure
from swift_dist.runs.folder import RunFolder
from swift_dist.runs.logs import LOG_FORMAT
from swift_dist.runs.outcome import newest_step

log = logging.getLogger(__name__)


class Stopwatch:
    """Seconds of each stage of a start, the first counted from the start of this process."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic() - _age_of_this_process()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = round(now - self._last, 3)
        self._last = now


class RunNotes:
    """The gang's observer (`swift_dist.cluster.gang.Observer`) that writes into a run folder."""

    def __init__(self, folder: RunFolder, stopwatch: Stopwatch) -> None:
        self._folder, self._stopwatch = folder, stopwatch
        self._attempts = 0

    def placed(self, hosts: Sequence[str], threads: Sequence[int]) -> None:
        self._folder.set_places(hosts, threads)
        if self._attempts == 0:
            self._stopwatch.lap("processes and imports")
            log.debug("start-up: %s", json.dumps(self._stopwatch.seconds))
        self._attempts += 1

    def restarting(self, cause: Failure, attempt: int) -> None:
        self._folder.add_restart(reason=cause.describe(), from_step=newest_step(self._folder))

    def stop_requested(self) -> bool:
        return self._folder.stop_requested()


@contextlib.contextmanager
def driver_log(folder: RunFolder) -> Iterator[None]:
    """What the driver logs also goes to logs/driver.log, the gang's details included."""
    handler = logging.FileHandler(folder.logs / "driver.log")
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    root, ours = logging.getLogger(), logging.getLogger("swift_dist.cluster")
    before = ours.level
    quiet = [(h, h.level) for h in root.handlers if h.level == logging.NOTSET]
    for shown, _ in quiet:
        shown.setLevel(root.getEffectiveLevel())
    ours.setLevel(logging.DEBUG)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        ours.setLevel(before)
        for shown, level in quiet:
            shown.setLevel(level)
        handler.close()


def _age_of_this_process() -> float:
    """Seconds since the kernel started it; 0 where /proc does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return 0.0
