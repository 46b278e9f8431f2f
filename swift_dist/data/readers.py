"""The documents of a unit of work, one by one, and what is wrong with those that are none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from swift_dist.data.sources import ReadOptions, SourceFile
from swift_dist.data.units import BOUNDARIES, Segment, Unit, boundary_kind, decompress, is_damage, next_boundary

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class BadRow:
    """A row that gives no document.

    Attributes:
        file: path; reason: what is wrong with it.
        base: byte of the file before which lines are still to be counted (-1: `line` counts from the file's start).
        line: lines (or table rows) before it, from `base` on.
        table: whether `line` counts rows of a table.
    """

    file: str
    reason: str
    base: int
    line: int
    table: bool = False


class Document(NamedTuple):
    """`position` is its byte or row in its file (in the decompressed text): with the file's index, its identity."""

    file: SourceFile
    position: int
    text: str


def documents(unit: Unit, options: ReadOptions) -> Iterator[Document | BadRow]:
    """The documents of a unit in order, each bad row in its place.

    Raises:
        OSError: a file cannot be read.
    """
    for segment in unit.segments:
        if segment.file.format in ("parquet", "arrow"):
            yield from _table_documents(segment, options)
            continue
        kind = boundary_kind(segment.file, options)
        if unit.data is not None:
            start, data, base, broken = segment.start, unit.data, -1, unit.broken
        else:
            start, data, broken = read_segment(segment, kind)
            base = start
        text = _Text(segment.file, start, data, base, unit.first_line)
        if start == 0 and data.startswith(_BOM):
            text = _Text(segment.file, len(_BOM), data[len(_BOM) :], base, unit.first_line)
        if segment.file.format == "jsonl":
            yield from _json_documents(text, options.text_key)
        else:
            yield from _plain_documents(text, kind)
        if broken:
            yield text.bad(len(text.data), broken)


def read_segment(segment: Segment, kind: str, limit: int | None = None) -> tuple[int, bytes, str]:
    """First byte, bytes, and damage of the documents of a segment that is read here.

    Args:
        kind: what ends a document ("line", "paragraph" or "file"); "bytes": nothing does, all is given.
        limit: bytes (decompressed) after which reading may stop, at the end of a line.

    Raises:
        OSError: the file cannot be read.
    """
    file = segment.file
    with Path(file.path).open("rb") as stream:
        if not file.compression:
            if kind in ("file", "bytes"):
                return 0, stream.read(-1 if limit is None else limit), ""
            start = next_boundary(stream, segment.start, kind, file.size)
            stop = segment.stop if limit is None else min(segment.stop, segment.start + limit)
            stop = next_boundary(stream, stop, kind, file.size)
            stream.seek(start)
            return start, stream.read(stop - start), ""
        held, damage = bytearray(), ""
        try:
            for block in decompress(stream, file.compression):
                held += block
                if limit is not None and len(held) >= limit:
                    return 0, bytes(held[: held.rfind(b"\n") + 1] or held), ""
        except Exception as error:
            if not is_damage(error):
                raise
            damage = str(error)
    # What follows the last newline is half a row; half a file is no document at all.
    if damage and kind != "bytes":
        held = held[: 0 if kind == "file" else held.rfind(b"\n") + 1]
    return 0, bytes(held), damage


@dataclass(frozen=True)
class _Text:
    file: SourceFile
    start: int
    data: bytes
    base: int
    first_line: int

    def bad(self, offset: int, reason: str) -> BadRow:
        """The row at `offset` of `data` as a bad one."""
        lines = self.data.count(b"\n", 0, offset)
        return BadRow(self.file.path, reason, self.base, lines + (self.first_line if self.base < 0 else 0))


def _json_documents(text: _Text, key: str) -> Iterator[Document | BadRow]:
    data, offset, size, loads = text.data, 0, len(text.data), json.loads
    while offset < size:
        end = data.find(b"\n", offset)
        end = size if end < 0 else end
        line = data[offset:end]
        try:
            value = loads(line.decode())[key]
        except Exception as error:
            if line.strip():
                yield text.bad(offset, _why(line, key, error))
            offset = end + 1
            continue
        if isinstance(value, str):
            if b"\\u" in line and not is_unicode(value):
                yield text.bad(offset, "half a surrogate pair (\\ud800 to \\udfff), which no text can hold")
            else:
                yield Document(text.file, text.start + offset, value)
        else:
            yield text.bad(offset, f"{key!r} holds {kind_of(value)}, not text")
        offset = end + 1


def _why(line: bytes, key: str, error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start} of the line)"
    if isinstance(error, KeyError):
        found = ", ".join(list(json.loads(line))[:8])
        return f"no key {key!r}, only {found or 'none'}"
    if isinstance(error, TypeError):
        return f"not a JSON object but {kind_of(json.loads(line))}"
    if isinstance(error, RecursionError):
        return "JSON nested too deeply"
    return f"not JSON: {error}"


def is_unicode(text: str) -> bool:
    """Whether text can be written as UTF-8: JSON's escapes can spell half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    names = {
        dict: "an object",
        list: "an array",
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _plain_documents(text: _Text, kind: str) -> Iterator[Document | BadRow]:
    """Documents of plain text: blank ones are none, line ends become newlines, those at either end are dropped
    (the text of a whole file keeps them)."""
    if kind == "file":
        spans = [(0, len(text.data))]
    else:
        spans, offset = [], 0
        for match in BOUNDARIES[kind].finditer(text.data):
            spans.append((offset, match.start()))
            offset = match.end()
        spans.append((offset, len(text.data)))
    for begin, end in spans:
        raw = text.data[begin:end].replace(b"\r\n", b"\n")
        if not raw.strip():
            continue
        try:
            document = raw.decode() if kind == "file" else raw.strip(b"\r\n").decode()
        except UnicodeDecodeError as error:
            yield text.bad(begin, f"not UTF-8 (byte {error.start} of the {kind})")
        else:
            yield Document(text.file, text.start + begin, document)


def _table_documents(segment: Segment, options: ReadOptions) -> Iterator[Document | BadRow]:
    import pyarrow as pa

    from swift_dist.data.tables import rows

    number = segment.start - 1
    try:
        for number, value in rows(segment.file, options.text_key, segment.start, segment.stop):
            if isinstance(value, str):
                yield Document(segment.file, number, value)
            else:
                reason = f"{options.text_key!r} holds {kind_of(value)}, not text"
                yield BadRow(segment.file.path, reason, -1, number, table=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = f"unreadable from here on: {str(error).splitlines()[0]}"
        yield BadRow(segment.file.path, reason, -1, number + 1, table=True)
