"""Rows of Parquet files and of Arrow files as the datasets library writes them (IPC streams)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from swift_dist.data.sources import SourceFile
from swift_dist.errors import JobError

_BATCH_ROWS = 1024


def row_groups(file: SourceFile, column: str | None) -> list[tuple[int, int]]:
    """(rows, bytes of text) of each piece that a reader can jump to.

    Args:
        column: the text column that is meant; None: all columns, of whatever kind.

    Raises:
        JobError: the file is not such a table or has no such text column.
    """
    try:
        schema = pq.read_schema(file.path) if file.format == "parquet" else _arrow_table(file.path).schema
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise JobError(
            "input", f"{file.name} is not a readable {file.format} file: {reason}", "restore the file"
        ) from None
    if column is not None:
        _require_text(file, schema, column)
    if file.format == "parquet":
        metadata = pq.read_metadata(file.path)
        groups = [metadata.row_group(k) for k in range(metadata.num_row_groups)]
        return [(group.num_rows, _text_bytes(group, column)) for group in groups]
    return [(batch.num_rows, batch.nbytes) for batch in _selected(file.path, column).to_batches()]


def _text_bytes(group: pq.RowGroupMetaData, column: str | None) -> int:
    columns = (group.column(k) for k in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in columns if column in (None, chunk.path_in_schema))


def _require_text(file: SourceFile, schema: pa.Schema, column: str) -> None:
    if column not in schema.names:
        raise JobError(
            "text_key", f"{file.name} has no column {column!r}, only {', '.join(schema.names)}", "--text_key names it"
        )
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise JobError(
            "text_key", f"column {column!r} of {file.name} holds {kind}, not text", "--text_key names another"
        )


def _arrow_table(path: str) -> pa.Table:
    """A memory-mapped table: nothing is read before its rows are."""
    source = pa.memory_map(path)
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(source).read_all()


def _selected(path: str, column: str | None) -> pa.Table:
    table = _arrow_table(path)
    return table if column is None else table.select([column])


def rows(file: SourceFile, column: str | None, start: int, stop: int) -> Iterator[tuple[int, Any]]:
    """(row number, value) of rows [start, stop), both on the borders that `row_groups` gave.

    Args:
        column: the column whose values are wanted; None: all, as {column: value}.

    Raises:
        pyarrow.ArrowException, OSError: the file is damaged.
    """
    if file.format == "arrow":
        table = _selected(file.path, column).slice(start, stop - start)
        batches: Iterator[pa.RecordBatch] = iter(table.to_batches(max_chunksize=_BATCH_ROWS))
    else:
        batches = _parquet_batches(file.path, column, start, stop)
    number = start
    for batch in batches:
        for value in (batch if column is None else batch.column(0)).to_pylist():
            yield number, value
            number += 1


def _parquet_batches(path: str, column: str | None, start: int, stop: int) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as table:
        chosen, first = [], 0
        for k in range(table.metadata.num_row_groups):
            if start <= first < stop:
                chosen.append(k)
            first += table.metadata.row_group(k).num_rows
        columns = None if column is None else [column]
        yield from table.iter_batches(_BATCH_ROWS, row_groups=chosen, columns=columns, use_threads=False)
