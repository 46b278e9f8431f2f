"""The output of a batch while it is made: every row exactly once, whatever interrupts it.

OUT.jsonl.partial       answers in the order in which they came; its first line says of what
OUT.jsonl               the rows in the order of the input; appears when it is whole
OUT.jsonl.infer.json    of what they are, and how it went

A killed command leaves whole lines and perhaps a torn last one, which is cut off; the same command goes on behind them.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from swift_dist.errors import JobError, RunError
from swift_dist.runs.files import write_json

_SYNC_SECONDS = 1.0


class Journal:
    """The rows of one output that are answered. A context manager: held by one process at a time.

    Args:
        output: the file that is to appear.
        identity: all that its content depends on.
        resume: whether to go on with what is there already; else it is refused.

    Attributes:
        done: numbers of the rows that have their answer; failed ones are asked again.
        is_finished: the output is whole and without errors.
        record: what is known of an output that is whole; {} of one that is not.

    Raises:
        JobError: the output is of something else, another process works on it, or it exists and must not be gone on
            with.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
        self.identity = json.loads(json.dumps(identity))
        self.output, self.partial, self.record_path, self._new = files_of(output)
        self.done: dict[int, tuple[int, int]] = {}
        self.failed: set[int] = set()
        self.is_finished = False
        self.record: dict[str, Any] = {}
        self._resume, self._synced, self._end = resume, 0.0, 0
        self._stream: BinaryIO | None = None

    def check(self) -> None:
        """Refuse what cannot be written or gone on with; changes nothing. Raises JobError as the class says."""
        if self.output.is_dir():
            raise JobError("output", f"{self.output} is a folder", "name a file, such as answers.jsonl")
        if not self.output.parent.is_dir():
            raise JobError("output", f"there is no folder {self.output.parent}", "make it first")
        if not os.access(self.output.parent, os.W_OK):
            raise JobError("output", f"{self.output.parent} is not writable for you", "name a file elsewhere")
        there = [path for path in (self.output, self.partial) if path.exists()]
        if not self._resume and there:
            raise JobError("output", f"{there[0]} exists and resume is never", "name another file")
        if self.output.exists():
            self.record = self._read_record()
            self._require_same(self.record.get("of"), self.output)
            self.is_finished = not self.record.get("failed")
        elif self.partial.exists():
            with self.partial.open("rb") as stream:
                line = stream.readline()
            if not _line({"of": self.identity}).startswith(line):  # a part of it: killed as it wrote that
                self._require_same(_header(line), self.partial)

    def _read_record(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.record_path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            raise JobError(
                "output", f"{self.output} exists, and nothing says that infer wrote it", "name another file"
            ) from None

    def _require_same(self, found: Any, where: Path) -> None:
        if not isinstance(found, Mapping):
            raise JobError("output", f"{where} is not of this command: it does not say of what it is", "remove it")
        differing = sorted(key for key in {*found, *self.identity} if found.get(key) != self.identity.get(key))
        if differing:
            key = differing[0]
            raise JobError(
                "output",
                f"{where} holds answers made with another {', '.join(differing)} "
                f"({key}: {_short(found.get(key))}, now {_short(self.identity.get(key))})",
                "name another file, or repeat the command that began it",
            )

    def __enter__(self) -> Journal:
        self.check()
        if self.is_finished:
            return self
        try:
            stream = os.fdopen(os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b")
            self._stream = stream
            _hold(stream, self.output)
            self._read(stream)
            if self.output.exists() and not self.done:
                self._take_over(stream)
        except OSError as error:
            raise JobError("output", f"{self.partial} cannot be written: {error.strerror}", "see --output") from None
        return self

    def _read(self, stream: BinaryIO) -> None:
        """Find the whole lines; what follows the last one is cut off."""
        header = stream.readline()
        if _header(header) != self.identity:
            stream.seek(0)
            stream.truncate()
            self._append(stream, {"of": self.identity})
            return
        end = stream.tell()
        for line in stream:
            entry = _parsed(line)
            if entry is None:
                break
            self._note(entry, end, len(line))
            end += len(line)
        stream.seek(end)
        stream.truncate()
        self._end = end

    def _take_over(self, stream: BinaryIO) -> None:
        """The rows of a whole output with failed ones, so that only those are asked again."""
        with self.output.open("rb") as rows:
            for index, line in enumerate(rows):
                row = json.loads(line)
                self._write(stream, {"index": index, "failed": "error" in row, "row": row})

    def _note(self, entry: Mapping[str, Any], offset: int, length: int) -> None:
        index = entry["index"]
        (self.failed.add if entry["failed"] else self.failed.discard)(index)
        if not entry["failed"] or index not in self.done:
            self.done[index] = (offset, length)

    def todo(self, index: int) -> bool:
        """Whether a row is still to be asked, when the command begins."""
        return index not in self.done or index in self.failed

    def add(self, index: int, row: Mapping[str, Any], *, failed: bool) -> None:
        """Note the answer of a row. It survives this process at once, and the machine within a second.

        Raises:
            RunError: the disk does not take it.
        """
        assert self._stream is not None
        try:
            self._write(self._stream, {"index": index, "failed": failed, "row": row})
        except OSError as error:
            raise RunError(f"{self.partial}: {error.strerror}", "make room; the same command goes on") from error

    def _write(self, stream: BinaryIO, entry: Mapping[str, Any]) -> None:
        offset = self._end
        length = self._append(stream, entry)
        self._note(entry, offset, length)

    def _append(self, stream: BinaryIO, entry: Mapping[str, Any]) -> int:
        line = _line(entry)
        stream.write(line)
        stream.flush()
        self._end += len(line)
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(stream.fileno())
            self._synced = time.monotonic()
        return len(line)

    def finish(self, count: int, numbers: Mapping[str, Any]) -> None:
        """Write the output in the order of the rows, and give it its name.

        Args:
            count: of rows; all are in `done`.
            numbers: for the record.

        Raises:
            RunError: the disk does not take it.
        """
        assert self._stream is not None and len(self.done) == count, (len(self.done), count)
        try:
            with self._new.open("wb") as stream:
                for index in range(count):
                    offset, length = self.done[index]
                    self._stream.seek(offset)
                    row = json.loads(self._stream.read(length))["row"]
                    stream.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
                stream.flush()
                os.fsync(stream.fileno())
            # Of a command that is killed between these lines the record never says more than the output holds: it
            # is not whole, and the next command finds all its rows in the partial one.
            write_json(self.record_path, {"of": self.identity, "failed": count})
            self._new.replace(self.output)
            write_json(self.record_path, {"of": self.identity, "rows": count, "failed": len(self.failed), **numbers})
            self.partial.unlink()
        except OSError as error:
            raise RunError(f"{self.output}: {error.strerror}", "make room; the same command goes on") from error

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()


def files_of(output: Path) -> tuple[Path, Path, Path, Path]:
    """(the output, what is partial, the record, the output until it has its name): all that is written of one."""
    output = output.absolute()
    names = (output.name, f"{output.name}.partial", f"{output.name}.infer.json", f".{output.name}.new")
    whole, partial, record, new = (output.parent / name for name in names)
    return whole, partial, record, new


def _hold(stream: BinaryIO, output: Path) -> None:
    with suppress(OSError):  # a file system without locks
        try:
            fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JobError("output", f"another process is writing {output}", "wait for it, or name another") from None


def _line(entry: Mapping[str, Any]) -> bytes:
    return (json.dumps(entry, ensure_ascii=False) + "\n").encode()


def _header(line: bytes) -> Any:
    """What a partial output is of; None where its first line does not say."""
    entry = None
    with suppress(ValueError):
        entry = json.loads(line)
    return entry.get("of") if isinstance(entry, dict) and line.endswith(b"\n") else None


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A whole entry; None: the line is torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
        return entry if isinstance(entry["index"], int) and "row" in entry and "failed" in entry else None
    except (ValueError, TypeError, KeyError):
        return None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
