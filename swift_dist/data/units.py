"""The input cut into units of work: the same units whatever the number of workers, so that finished ones can be kept.

A unit is part of a file (or several small files): about `unit_bytes` of text or a run of table rows. Where it begins
and ends is a function of the files alone. Plain text is cut by whoever encodes it; compressed text has no places to
jump to, so the driver decompresses it once and hands out the pieces.
"""

from __future__ import annotations

import re
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from swift_dist.data.sources import ReadOptions, SourceFile
from swift_dist.errors import RunError

BOUNDARIES = {"line": re.compile(rb"\n"), "paragraph": re.compile(rb"\n[ \t\r]*\n")}
_READ = 1 << 20
_READ_COMPRESSED = 1 << 16  # a thousandfold compression still gives only 64 MiB at once


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of a table, or the documents of a text that begin between the boundaries at those bytes."""

    file: SourceFile
    start: int
    stop: int


@dataclass(frozen=True)
class Unit:
    """What one worker encodes at a time.

    Attributes:
        id: (index of its first file, number of the piece in that file): the order of documents.
        input_bytes: how much of the input it stands for, as stored.
        data: the text itself where it had to be decompressed: whole documents, from byte segments[0].start on.
        first_line: lines of the file before `data`.
        broken: why the file cannot be read beyond `data`, or "".
        last: whether the file (or files) end here.
    """

    id: tuple[int, int]
    segments: tuple[Segment, ...]
    input_bytes: int
    data: bytes | None = None
    first_line: int = 0
    broken: str = ""
    last: bool = True


def unit_size(files: Sequence[SourceFile]) -> int:
    """Bytes of text in one unit: 1/256 of the input, between 1 and 32 MiB."""
    return min(max(sum(file.size for file in files) // 256, 1 << 20), 32 << 20)


def boundary_kind(file: SourceFile, options: ReadOptions) -> str:
    """What ends a document of a text file: "line", "paragraph" or "file"."""
    return "line" if file.format == "jsonl" else options.text_unit


def plan(files: Sequence[SourceFile], options: ReadOptions, size: int) -> tuple[list[Unit], list[SourceFile]]:
    """Cut the input.

    Returns:
        the units that are known beforehand, and the compressed files whose units `Stream` finds.

    Raises:
        JobError: a table is unreadable or lacks the text column.
    """
    units: list[Unit] = []
    streams: list[SourceFile] = []
    group: list[SourceFile] = []

    def close_group() -> None:
        if group:
            segments = tuple(Segment(file, 0, file.size) for file in group)
            units.append(Unit((group[0].index, 0), segments, sum(file.size for file in group)))
            group.clear()

    for file in files:
        if file.format in ("parquet", "arrow"):
            close_group()
            units += table_units(file, options.text_key, size)
        elif boundary_kind(file, options) == "file" or file.size <= size // (8 if file.compression else 2):
            if sum(other.size for other in group) + file.size > size:
                close_group()
            group.append(file)
        elif file.compression:
            close_group()
            streams.append(file)
        else:
            close_group()
            for number, start in enumerate(range(0, file.size, size)):
                stop = min(start + size, file.size)
                units.append(Unit((file.index, number), (Segment(file, start, stop),), stop - start))
    close_group()
    return units, streams


def table_units(file: SourceFile, column: str | None, size: int) -> list[Unit]:
    """Units of a table, cut between row groups. column: the one that is measured; None: all.

    Raises:
        JobError: the table is unreadable or lacks the text column.
    """
    from swift_dist.data.tables import row_groups

    groups = row_groups(file, column)
    total = sum(text_bytes for _, text_bytes in groups) or 1
    units: list[Unit] = []
    start = stop = held = 0
    for k, (rows, text_bytes) in enumerate(groups):
        stop, held = stop + rows, held + text_bytes
        if stop > start and (held >= size or k == len(groups) - 1):
            stored = held * file.size // total
            units.append(Unit((file.index, len(units)), (Segment(file, start, stop),), stored))
            start, held = stop, 0
    return units


def next_boundary(stream: BinaryIO, offset: int, kind: str, size: int) -> int:
    """The first document boundary found from byte `offset` on; the file's size where there is none."""
    if offset == 0 or offset >= size:
        return min(offset, size)
    stream.seek(offset)
    pattern, held, base = BOUNDARIES[kind], b"", offset
    while block := stream.read(_READ):
        held += block
        if match := pattern.search(held):
            return base + match.end()
        # A boundary may straddle two blocks: it begins at the last newline seen, if anywhere.
        keep = held.rfind(b"\n")
        keep = len(held) if keep < 0 else keep
        base, held = base + keep, held[keep:]
    return size


def decompress(stream: BinaryIO, compression: str) -> Iterator[bytes]:
    """Decompressed blocks of a .gz or .zst file of any number of members.

    Raises:
        EOFError: the file ends within a member. zlib.error, zstandard.ZstdError: it is damaged.
    """
    new = _decoders(compression)
    decoder, begun = new(), False
    while block := stream.read(_READ_COMPRESSED):
        while block:
            begun = True
            if data := decoder.decompress(block):
                yield data
            if not decoder.eof:
                break
            block, decoder, begun = decoder.unused_data, new(), False
            if not block.strip(b"\0"):  # padding after the last member
                break
    if begun:
        raise EOFError("the compressed file is cut off")


def _decoders(compression: str) -> Callable[[], Any]:
    if compression == "gz":
        return lambda: zlib.decompressobj(wbits=31)
    import zstandard

    return lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def is_damage(error: Exception) -> bool:
    """Whether an exception of `decompress` says that the file is damaged."""
    return isinstance(error, (EOFError, zlib.error)) or type(error).__name__ == "ZstdError"


class Stream:
    """The units of one compressed file, decompressed once, in order. `next` may be called from several threads."""

    def __init__(self, file: SourceFile, kind: str, size: int) -> None:
        self.file, self._size = file, size
        self._pattern = BOUNDARIES[kind]
        self._lock = threading.Lock()
        self._raw = Path(file.path).open("rb")  # noqa: SIM115 (closed by `close`)
        self._blocks = decompress(self._raw, file.compression)
        self._held = bytearray()
        self._number = self._start = self._line = self._read = 0
        self._broken, self._ended = "", False

    def next(self) -> Unit | None:
        """The next unit, or None after the last one."""
        with self._lock:
            if self._ended:
                return None
            cut = self._find_cut()
            self._ended = cut is None
            data = bytes(self._held if cut is None else memoryview(self._held)[:cut])
            del self._held[: len(data)]
            position = self._raw.tell()
            unit = Unit(
                id=(self.file.index, self._number),
                segments=(Segment(self.file, self._start, self._start + len(data)),),
                input_bytes=position - self._read,
                data=data,
                first_line=self._line,
                broken=self._broken,
                last=self._ended,
            )
            self._number, self._start, self._read = self._number + 1, self._start + len(data), position
            self._line += data.count(b"\n")
            if self._ended:
                self._raw.close()
            return unit

    def _find_cut(self) -> int | None:
        """Where the unit ends in what is held: the first boundary from `size` on, or None at the end of the file."""
        search_from = self._size
        while True:
            if len(self._held) > search_from:
                if match := self._pattern.search(self._held, search_from):
                    return match.end()
                newline = self._held.rfind(b"\n", search_from)
                search_from = len(self._held) if newline < 0 else newline
            if not self._more():
                return None

    def _more(self) -> bool:
        try:
            self._held += next(self._blocks)
        except StopIteration:
            return False
        except OSError as error:
            raise RunError(f"cannot read {self.file.name}: {error}") from error
        except Exception as error:
            if not is_damage(error):
                raise
            self._broken = str(error)
            # What follows the last newline is half a row.
            del self._held[self._held.rfind(b"\n") + 1 :]
            return False
        return True

    def close(self) -> None:
        self._raw.close()
