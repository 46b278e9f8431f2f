"""Logs of a run: the format that ranks and driver write, and reading them merged by time."""

from __future__ import annotations

import faulthandler
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
"""What ``logging`` writes to logs/rank_<n>.log and logs/driver.log; asctime is ``2025-01-31 12:00:00,123``."""

_STAMP = re.compile(r"^(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:[.,](\d+))?")


def write_into(path: Path) -> None:
    """Everything that this process prints or logs goes to the end of `path` from now on; SIGUSR1 adds its stacks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr, force=True)
    logging.captureWarnings(True)
    faulthandler.enable(sys.stderr)
    faulthandler.register(signal.SIGUSR1, sys.stderr, all_threads=True)


@dataclass(frozen=True)
class LogLine:
    """A line of one file. `stamp` is that of its record, so a traceback's lines stay under their record."""

    source: str
    text: str
    stamp: str


def log_files(folder: Path, ranks: tuple[int, ...] = ()) -> list[Path]:
    """The driver's log and every rank's, in rank order; with `ranks` only theirs."""

    def order(path: Path) -> tuple[int, str]:
        match = re.fullmatch(r"rank_(\d+)", path.stem)
        return (int(match[1]) if match else -1, path.name)

    paths = sorted(folder.glob("*.log"), key=order)
    return [p for p in paths if order(p)[0] in ranks] if ranks else paths


class _File:
    """One log file, read on from where the last look ended."""

    def __init__(self, path: Path) -> None:
        self._path, self._position, self._pending, self._stamp = path, 0, b"", ""

    def read(self) -> list[LogLine]:
        """Lines that were completed since the last look."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                data = file.read()
        except FileNotFoundError:
            return []
        self._position += len(data)
        *lines, self._pending = (self._pending + data).split(b"\n")
        return [self._line(line) for line in lines]

    def rest(self) -> list[LogLine]:
        """A last line without its end, as a killed process leaves one."""
        pending, self._pending = self._pending, b""
        return [self._line(pending)] if pending else []

    def _line(self, data: bytes) -> LogLine:
        text = data.decode("utf-8", errors="replace").rstrip("\r")
        if match := _STAMP.match(text):
            self._stamp = f"{match[1]} {match[2]}.{match[3] or '0'}"
        return LogLine(self._path.stem, text, self._stamp)


def read_logs(folder: Path, *, ranks: tuple[int, ...] = (), pattern: str | None = None) -> list[LogLine]:
    """All lines of a run's logs, merged by the time of their records.

    Args:
        ranks: only these ranks' logs (none: all, and the driver's).
        pattern: only lines in which this regular expression is found.
    """
    lines = [line for path in log_files(folder, ranks) for file in [_File(path)] for line in file.read() + file.rest()]
    found = [line for line in lines if pattern is None or re.search(pattern, line.text)]
    return sorted(found, key=lambda line: line.stamp)  # stable: lines of one record keep their order


def follow_logs(
    folder: Path,
    until: Callable[[], bool],
    *,
    ranks: tuple[int, ...] = (),
    pattern: str | None = None,
    poll_seconds: float = 0.3,
) -> Iterator[LogLine]:
    """Lines as `read_logs` gives them, then new ones as they are written (files of new ranks too), until `until()`."""
    files: dict[Path, _File] = {}
    while True:
        ending = until()
        fresh: list[LogLine] = []
        for path in log_files(folder, ranks):
            file = files.setdefault(path, _File(path))
            fresh += file.read() + (file.rest() if ending else [])
        for line in sorted(fresh, key=lambda line: line.stamp):
            if pattern is None or re.search(pattern, line.text):
                yield line
        if ending:
            return
        time.sleep(poll_seconds)
