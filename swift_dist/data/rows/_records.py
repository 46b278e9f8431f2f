"""The records of row files, of every kind of file, and the units of work that they are cut into."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift_dist.data.bad_rows import newlines_before
from swift_dist.data.readers import is_unicode, kind_of, read_segment
from swift_dist.data.rows.base import BadRowError
from swift_dist.data.sources import SourceFile
from swift_dist.data.units import Segment, Unit, next_boundary, table_units
from swift_dist.errors import RunError

UNIT_BYTES = 8 << 20
_TABLES = ("parquet", "arrow")
_BOM = b"\xef\xbb\xbf"
_LARGEST_CELL = (1 << 31) - 1


@dataclass(frozen=True)
class RowUnit(Unit):
    """A unit of rows: a piece of one file, or several small files.

    Attributes:
        rows: which of its records are read, ascending; None: all.
    """

    rows: tuple[int, ...] | None = None


class Damage(BadRowError):
    """Not one record but a part of a file cannot be read."""


Record = bytes | Mapping[str, Any] | BadRowError
"""A line as it stands, a row, or what is wrong with it."""


def counts_rows(file: SourceFile) -> bool:
    """Whether places in the file are told by rows (of tables, of lists in JSON) instead of lines."""
    return file.format in (*_TABLES, "json")


def origin(file: SourceFile, number: int) -> str:
    """Where record `number` (from 0) stands, as people look it up."""
    return f"{file.path}: row {number + 1}" if counts_rows(file) else f"{file.path}:{number + 1}"


def records(segment: Segment, first_line: int = 0, limit: int | None = None) -> Iterator[tuple[int, Record]]:
    """(line or row, from 0; record) of a segment in order. Blank lines are none.

    Args:
        first_line: lines of the file before the segment.
        limit: bytes of text after which reading may stop.

    Raises:
        RunError: the file is not what it was when it was found, or cannot be read.
    """
    file = segment.file
    _require_unchanged(file)
    if file.format in _TABLES:
        yield from _table_records(segment)
        return
    try:
        start, data, broken = read_segment(segment, "bytes" if file.format == "json" else "line", limit)
    except OSError as error:
        raise RunError(f"cannot read {file.name}: {error.strerror or error}") from error
    if start == 0 and data.startswith(_BOM):
        data = data[len(_BOM) :]
    number = first_line - 1
    read = {"json": _json_records, "csv": _csv_records, "tsv": _csv_records}.get(file.format, _lines)
    for at, record in read(data, first_line, file):
        if broken and isinstance(record, Damage):
            break  # what is said below is the reason
        number = at
        yield number, record
    if broken:
        end = number + 1 if counts_rows(file) else data.count(b"\n")
        yield end, Damage(f"the rest is lost: {broken}")


def _require_unchanged(file: SourceFile) -> None:
    try:
        stat = Path(file.path).stat()
    except OSError as error:
        raise RunError(f"cannot read {file.name}: {error.strerror}") from error
    if (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns):
        raise RunError(f"{file.name} changed since it was found", "start again when it stays as it is")


def _lines(data: bytes, first_line: int, file: SourceFile) -> Iterator[tuple[int, Record]]:
    offset, size, number = 0, len(data), first_line
    while offset < size:
        end = data.find(b"\n", offset)
        end = size if end < 0 else end
        line = data[offset:end]
        if line.strip():
            yield number, line
        offset, number = end + 1, number + 1


def _csv_records(data: bytes, first_line: int, file: SourceFile) -> Iterator[tuple[int, Record]]:
    """Records of a file whose first line names the columns; cells are text, empty ones are absent."""
    text = io.StringIO(data.decode(errors="surrogateescape"), newline="")
    reader = csv.reader(text, delimiter="," if file.format == "csv" else "\t", strict=True)
    header: list[str] | None = None
    before = csv.field_size_limit(_LARGEST_CELL)  # the module's own limit is 128 KiB a cell, for the whole process
    try:
        while True:
            line = reader.line_num
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, BadRowError(f"not {file.format.upper()}: {error}")
                continue
            if not cells:
                continue
            if header is None:
                header = cells
                if len(set(header)) < len(header):
                    yield line, Damage(f"the first line names a column twice: {', '.join(header)}"[:200])
                    return
            elif not is_unicode("".join(cells)):
                yield line, BadRowError("not UTF-8")
            elif len(cells) != len(header):
                yield line, BadRowError(f"{len(cells)} cells, but {len(header)} columns are named in the first line")
            else:
                yield line, {name: cell for name, cell in zip(header, cells, strict=True) if cell}
    finally:
        csv.field_size_limit(before)


def _json_records(data: bytes, first_line: int, file: SourceFile) -> Iterator[tuple[int, Record]]:
    """Entries of one list in JSON."""
    text = data.decode(errors="surrogateescape")
    entries = json.JSONDecoder()
    at, number = _skip(text, text.find("[") + 1), 0
    while at < len(text) and text[at] != "]":
        try:
            value, at = entries.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield number, Damage(f"not JSON, so the rest is lost: {error}")
            return
        yield number, _row(value)
        number, at = number + 1, _skip(text, at)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            break
    if at >= len(text) or text[at] != "]":
        yield number, Damage("the list does not end here with ], so the rest is lost")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _table_records(segment: Segment) -> Iterator[tuple[int, Record]]:
    import pyarrow as pa

    from swift_dist.data.tables import rows

    number = segment.start - 1
    try:
        for number, value in rows(segment.file, None, segment.start, segment.stop):
            yield number, _without_nulls(value)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        yield number + 1, Damage(f"unreadable from here on: {str(error).splitlines()[0]}")


def _without_nulls(value: Any) -> Any:
    """A table's structs have every key that any row has; those that are null were not written there."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def parse(record: Record, file: SourceFile) -> Mapping[str, Any]:
    """The row of a record.

    Raises:
        BadRowError: it is none.
    """
    if isinstance(record, BadRowError):
        raise record
    if not isinstance(record, bytes):
        return record
    try:
        text = record.decode()
    except UnicodeDecodeError as error:
        raise BadRowError(f"not UTF-8 (byte {error.start} of the line)") from None
    if file.format == "text":
        return {"text": text.rstrip("\r")}
    try:
        value = json.loads(text)
    except RecursionError:
        raise BadRowError("JSON nested too deeply") from None
    except ValueError as error:
        raise BadRowError(f"not JSON: {error}") from None
    row = _row(value, escaped="\\u" in text)
    if isinstance(row, BadRowError):
        raise row
    return row


def _row(value: Any, escaped: bool = True) -> Mapping[str, Any] | BadRowError:
    if not isinstance(value, dict):
        return BadRowError(f"not a JSON object but {kind_of(value)}")
    if escaped and not is_unicode(json.dumps(value, ensure_ascii=False)):
        return BadRowError("not UTF-8, or half a surrogate pair (\\ud800 to \\udfff), which no text can hold")
    return value


def unit_records(unit: RowUnit) -> Iterator[tuple[SourceFile, int, Record]]:
    """(file, line or row from 0, record) of those records of a unit that are read. Damage is always told."""
    wanted = None if unit.rows is None else set(unit.rows)
    index = 0
    for segment in unit.segments:
        for number, record in records(segment, unit.first_line):
            if isinstance(record, Damage):
                yield segment.file, number, record
                continue
            if wanted is None or index in wanted:
                yield segment.file, number, record
            index += 1


def count_records(unit: RowUnit) -> int:
    if all(segment.file.format in _TABLES for segment in unit.segments):
        return sum(segment.stop - segment.start for segment in unit.segments)
    return sum(not isinstance(record, Damage) for _, _, record in unit_records(unit))


def cut(files: Sequence[SourceFile], size: int | None = None) -> list[RowUnit]:
    """Units of about `size` bytes that hold every record once, in file order: a function of the files and `size` alone.

    Without `size` it is UNIT_BYTES. Lines of plain files and rows of tables are cut; a compressed file, a list in JSON
    and a CSV file are one unit. Small files share one.
    """
    size = size or UNIT_BYTES
    units: list[RowUnit] = []
    group: list[SourceFile] = []

    def close_group() -> None:
        if group:
            whole = tuple(Segment(file, 0, file.size) for file in group)
            units.append(RowUnit((group[0].index, 0), whole, sum(file.size for file in group)))
            group.clear()

    for file in files:
        if file.format in _TABLES:
            close_group()
            units += (RowUnit(u.id, u.segments, u.input_bytes) for u in table_units(file, None, size))
        elif file.size > size // 2 and file.format in ("jsonl", "text") and not file.compression:
            close_group()
            units += _line_units(file, size)
        else:
            if sum(other.size for other in group) + file.size > size // (8 if file.compression else 1):
                close_group()
            group.append(file)
    close_group()
    return units


def _line_units(file: SourceFile, size: int) -> list[RowUnit]:
    starts = range(0, file.size, size)
    with Path(file.path).open("rb") as stream:
        begins = [next_boundary(stream, start, "line", file.size) for start in starts]
    lines = newlines_before(Path(file.path), sorted(set(begins)))
    units = []
    for number, (start, begin) in enumerate(zip(starts, begins, strict=True)):
        stop = min(start + size, file.size)
        segments = (Segment(file, start, stop),)
        units.append(RowUnit((file.index, number), segments, stop - start, first_line=lines[begin]))
    return units
