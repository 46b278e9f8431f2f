"""metrics.jsonl: one JSON row a step, and a row for every evaluation. Appending, resuming, reading, following."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from swift_dist.errors import RunError
from swift_dist.runs.files import write_atomically

Row = dict[str, Any]
_TAIL_BYTES = 64 * 1024


class MetricsLog:
    """The file as rank 0 writes it.

    Args:
        path: the run's metrics.jsonl; made if there is none.
        resume_step: the step that training continues after (0: from scratch). Rows of later steps, which will be
            computed again, are dropped, and so is a last line that a crash tore; the file is replaced in one move.

    Raises:
        RunError: if the file cannot be written.
    """

    def __init__(self, path: str | Path, resume_step: int = 0) -> None:
        self.path = Path(path)
        self._resumed_from = resume_step
        try:
            if self.path.exists():
                kept = [row for row in read_metrics(self.path) if row["step"] <= resume_step]
                write_atomically(self.path, "".join(_line(row) for row in kept))
            # A process believed dead keeps its descriptor of the replaced file: it cannot add rows to this one.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._descriptor: int | None = os.open(self.path, flags, 0o644)
        except OSError as error:
            raise _failed(self.path, error) from None

    def append(self, row: Mapping[str, Any]) -> Row:
        """Add a row, which must hold ``step``; visible to readers at once. The first row after a resume says so.

        A number that is not finite becomes null (JSON has none). Returns the row as written.

        Raises:
            RunError: if it cannot be written (a full disk): a run that nobody can see must not go on for days.
        """
        assert self._descriptor is not None, "the log is closed"
        written = {key: _finite(value) for key, value in row.items()}
        if self._resumed_from:
            written["resumed_from"], self._resumed_from = self._resumed_from, 0
        data = _line(written).encode()
        try:
            if os.write(self._descriptor, data) != len(data):
                raise OSError(28, "No space left on device")
        except OSError as error:
            raise _failed(self.path, error) from None
        return written

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _failed(path: Path, error: OSError) -> RunError:
    return RunError(f"{path} cannot be written: {error.strerror or error}", "free space, then run the command again")


def parse_row(line: str) -> Row | None:
    """A row, or None for a line that is torn or holds something else."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def read_metrics(path: str | Path) -> list[Row]:
    """All whole rows, in the file's order; none where there is no file."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [row for line in text.splitlines() if (row := parse_row(line)) is not None]


def last_rows(path: str | Path) -> list[Row]:
    """The newest rows (those in the file's last 64 KiB): enough to say where a run is, whatever its length."""
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines = text.splitlines()[1 if size > _TAIL_BYTES else 0 :]
    return [row for line in lines if (row := parse_row(line)) is not None]


def follow(
    path: str | Path, until: Callable[[], bool], *, only_new: bool = False, poll_seconds: float = 0.2
) -> Iterator[Row | None]:
    """Rows as they are written, from the first (with `only_new`: from those written after this call's first look);
    None after each look that found nothing new.

    Works on a shared folder too (it polls). Where a resume replaced the file, rows that were already given are
    passed over, and it goes on with the ones computed again. Ends at the first look after `until()` became true.
    """
    path = Path(path)
    seen: list[int] = []  # hashes of the lines given, to find what a replaced file kept of them
    inode, position, index, pending = -1, 0, 0, b""
    silent = only_new
    while True:
        ending = until()
        found = False
        try:
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if stat.st_ino != inode or stat.st_size < position:
                    inode, position, index, pending = stat.st_ino, 0, 0, b""
                file.seek(position)
                data = file.read()
        except OSError:  # not there yet, or replaced this moment on a network file system
            data = b""
        position += len(data)
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            if index < len(seen) and seen[index] == hash(line):
                index += 1
                continue
            del seen[index:]
            seen.append(hash(line))
            index += 1
            row = parse_row(line.decode("utf-8", errors="replace"))
            if row is not None and not silent:
                found = True
                yield row
        silent = False
        if ending:
            return
        if not found:
            yield None
        time.sleep(poll_seconds)
