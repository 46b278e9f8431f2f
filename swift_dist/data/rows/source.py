"""Sources of rows: what ``data.train`` and ``data.validation`` name, opened once in the driver, read by any process.

The driver finds the files, decides the format of the rows and cuts them into units; workers read units. Rows, their
order and a source's fingerprint depend on the content of the files alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from swift_dist.config.job import DataSection, DatasetEntry
from swift_dist.data.order import Permutation
from swift_dist.data.readers import BadRow
from swift_dist.data.rows._address import parse_address, source_files
from swift_dist.data.rows._fields import KNOWN_COLUMNS
from swift_dist.data.rows._formats import detect, find_format, formats
from swift_dist.data.rows._records import (
    RowUnit,
    count_records,
    counts_rows,
    cut,
    origin,
    parse,
    records,
    unit_records,
)
from swift_dist.data.rows.base import BadRowError, Row, RowFormat
from swift_dist.data.sources import SourceFile
from swift_dist.data.units import Segment
from swift_dist.errors import JobError, RunError

_LOOK_AT = 1000  # rows among which the first good one is looked for
_LOOK_BYTES = 4 << 20
_TAKE_SEED = 0  # of the permutation that #N follows: the same rows in every run
_READ = 1 << 22
_VERSION = 1  # of what rows are read as: another one makes samples that are stored be made again


@dataclass(frozen=True)
class RowSource:
    """One entry of ``data.train`` or ``data.validation``.

    Attributes:
        name: its path as the job has it.
        files: where its rows are, in order.
        format: of its rows, a file of this folder or ``package.module:ATTRIBUTE``.
        columns: (name that the format knows, name in the files).
        take: N of ``#N``: so many records are read, by a fixed permutation, in file order; where there are fewer, all
            of them are read again and again, and then some once more. Bad rows are among those that are counted.
        weight, epochs: of the entry.
    """

    name: str
    files: tuple[SourceFile, ...]
    format: str
    columns: tuple[tuple[str, str], ...] = ()
    take: int | None = None
    weight: float | None = None
    epochs: float | None = None

    def fingerprint(self) -> str:
        """A hash of all that decides which rows there are: bytes of the files, `take`, `columns`, `format`.

        Raises:
            RunError: a file cannot be read.
        """
        import xxhash

        kinds = [(file.format, file.compression) for file in self.files]
        read_as = [_VERSION, kinds, self.take, sorted(self.columns), self.format]
        digest = xxhash.xxh3_128(json.dumps(read_as).encode())
        for file in self.files:
            digest.update(file.size.to_bytes(8, "little"))
            try:
                with Path(file.path).open("rb") as stream:
                    while block := stream.read(_READ):
                        digest.update(block)
            except OSError as error:
                raise RunError(f"cannot read {file.name}: {error.strerror}") from error
        return digest.hexdigest()

    def units(self, size: int | None = None) -> list[RowUnit]:
        """Pieces that workers read on their own; together, in this order, they are the rows of the source.

        Args:
            size: bytes of one, about (None: `_records.UNIT_BYTES`).

        Raises:
            JobError: a table is unreadable, or #N asks for rows of which there are none.
        """
        units = cut(self.files, size)
        return units if self.take is None else _taken(units, self.take, self.name)


def _taken(units: Sequence[RowUnit], take: int, name: str) -> list[RowUnit]:
    """Units of `take` records: whole passes first, then the records that a fixed permutation puts first."""
    counts = [count_records(unit) for unit in units]
    total = sum(counts)
    if not total:
        raise JobError("data", f"{name}: there are no rows to take from", "give files that are not empty")
    passes, rest = divmod(take, total)
    files = 1 + max(segment.file.index for unit in units for segment in unit.segments)
    taken = [_of_pass(unit, unit.rows, number * files) for number in range(passes) for unit in units]
    chosen = np.sort(Permutation(total, _TAKE_SEED, 0)(np.arange(rest)))
    begins = np.concatenate([[0], np.cumsum(counts)])
    for unit, begin, end in zip(units, begins[:-1], begins[1:], strict=True):
        first, last = np.searchsorted(chosen, (begin, end))
        if last > first:
            taken.append(_of_pass(unit, tuple((chosen[first:last] - begin).tolist()), passes * files))
    return taken


def _of_pass(unit: RowUnit, rows: tuple[int, ...] | None, index: int) -> RowUnit:
    number = (unit.id[0] + index, unit.id[1])
    return RowUnit(number, unit.segments, unit.input_bytes, first_line=unit.first_line, rows=rows)


def read_rows(source: RowSource, unit: RowUnit) -> Iterator[tuple[str, Row | BadRow]]:
    """The rows of a unit of `source` in file order, each with its origin: ``path:line``, ``path: row n`` in tables and
    lists of JSON. What is none is a BadRow in its place, for data.bad_rows.describe.

    Raises:
        RunError: a file is not what it was, or cannot be read.
    """
    read = find_format(source.format).read
    for file, number, record in unit_records(unit):
        where = origin(file, number)
        given: Mapping[str, Any] = {}
        try:
            given = renamed(parse(record, file), source.columns)
            row: Row | BadRow = read(given)
        except BadRowError as error:
            mixed = _mixed(given, source)
            row = BadRow(file.path, f"{error}{mixed}", -1, number, table=counts_rows(file))
        except Exception as error:
            error.add_note(f"while the format {source.format} read {where}")
            raise
        yield where, row


def first_rows(source: RowSource) -> Iterator[tuple[str, Row | BadRow]]:
    """The rows among which a good one is looked for, whichever rows #N takes; as `read_rows`."""
    return islice((found for unit in cut(source.files, None) for found in read_rows(source, unit)), _LOOK_AT)


def _mixed(row: Mapping[str, Any], source: RowSource) -> str:
    """For people, where a row is of another format than its source; "" where it is not."""
    found = detect(row)
    if found is None or ":" in source.format or found.name == source.format:
        return ""
    return f" (it looks like {found.name}, the source is {source.format})"


def renamed(row: Mapping[str, Any], columns: Sequence[tuple[str, str]]) -> Mapping[str, Any]:
    """The row with the names that formats know; a column whose name another one takes is left out."""
    if not columns:
        return row
    gone = {name for pair in columns for name in pair}
    kept = {key: value for key, value in row.items() if key not in gone}
    return kept | {ours: row[theirs] for ours, theirs in columns if theirs in row}


def open_sources(entries: tuple[DatasetEntry, ...], section: DataSection, key: str) -> list[RowSource]:
    """The sources of ``data.train`` or ``data.validation``, each with the format of its rows.

    What the catalogue lists is read as it says; all else by ``data.format`` and ``data.columns``.

    Args:
        entries: the section's entries of that key.
        key: "data.train" or "data.validation": names the split, and is told in errors.

    Raises:
        JobError: a source does not exist, cannot be had, or its first rows are of no known format.
    """
    check_columns(section)
    sources, columns_seen = [], set()
    for entry in entries:
        address = parse_address(entry.path, key)
        known = address.known
        if known and section.format not in ("auto", known.format):
            remedy = f"data.format: auto, or {address.hub}://{address.path} to read it your way"
            raise JobError("data.format", f"{section.format}, but {entry.path} is {known.format}", remedy)
        files = source_files(address, entry.path, key)
        columns = tuple(sorted((known.columns if known else section.columns).items()))
        wanted = find_format(known.format if known else section.format) if known or section.format != "auto" else None
        found, seen = _look(files, columns, wanted, entry.path, key)
        if not known:
            columns_seen |= seen
        name = section.format if ":" in section.format and not known else found.name
        sources.append(RowSource(entry.path, files, name, columns, address.take, entry.weight, entry.epochs))
    for ours, theirs in section.columns.items():
        if key == "data.train" and theirs not in columns_seen:
            raise JobError(
                "data.columns",
                f"{ours} is to be the column {theirs}, which no row has that was looked at",
                f"{{name that a format knows: name in the file}}; there are {', '.join(sorted(columns_seen)[:12])}",
            )
    return sources


def check_columns(section: DataSection) -> None:
    """Raise JobError where data.format, or a name that data.columns gives to a column, is none."""
    if section.format != "auto":
        find_format(section.format)
    unknown = [] if ":" in section.format else [ours for ours in section.columns if ours not in KNOWN_COLUMNS]
    if unknown:
        known = ", ".join(sorted(KNOWN_COLUMNS))
        remedy = f"{{name that a format knows: name in the file}}; formats know {known}"
        raise JobError("data.columns", f"no format knows a column {unknown[0]}", remedy)


def _look(
    files: Sequence[SourceFile], columns: Sequence[tuple[str, str]], wanted: RowFormat | None, path: str, key: str
) -> tuple[RowFormat, set[str]]:
    """The format of the first good row, and the columns of the rows looked at (as the files name them)."""
    seen: set[str] = set()
    reasons: list[str] = []
    for number, (file, record, where) in enumerate(_first_records(files)):
        if number == _LOOK_AT:
            break
        try:
            row = parse(record, file)
            seen |= set(row)
            row = renamed(row, columns)
            known = wanted or detect(row)
            if known is None:
                raise BadRowError(f"no format knows the columns {', '.join(list(row)[:12]) or '(none)'}{_hint(row)}")
            known.read(row)
        except BadRowError as error:
            reasons.append(f"{where}: {error}")
            continue
        return known, seen | _more_columns(files) if columns else seen
    listed = "\n  ".join(reasons[:3])
    if files[0].path.endswith((".json", ".json.gz", ".json.zst")) and reasons and "not JSON: " in reasons[0]:
        listed += "\n  a .json file holds a list of rows, or a row a line"
    names = ", ".join(known.name for known in formats())
    raise JobError(
        key,
        f"{path}: of its first rows none can be used\n  {listed}" if reasons else f"{path}: there are no rows in it",
        f"data.format says what they are ({names}), data.columns renames columns; docs/rows.md shows each",
    )


def _hint(row: Mapping[str, Any]) -> str:
    if len(row) == 1 and any(mark in name for name in row for mark in ";|\t"):
        return " (a .csv file has commas between its cells, a .tsv file tabs)"
    if row.get("label") is None:
        return ""
    return " (a label: data.format kto or classification says what it means; or leave it out with another format)"


def _more_columns(files: Sequence[SourceFile]) -> set[str]:
    seen: set[str] = set()
    for number, (file, record, _) in enumerate(_first_records(files)):
        if number == _LOOK_AT:
            break
        try:
            seen |= set(parse(record, file))
        except BadRowError:
            continue
    return seen


def _first_records(files: Sequence[SourceFile]) -> Iterator[tuple[SourceFile, Any, str]]:
    """Records from the beginning of each file, without reading more than that."""
    from swift_dist.data.tables import row_groups

    for file in files:
        stop = file.size
        if file.format in ("parquet", "arrow"):
            stop = next((rows for rows, _ in row_groups(file, None) if rows), 0)
        for number, record in records(Segment(file, 0, stop), limit=_LOOK_BYTES):
            yield file, record, origin(file, number)
