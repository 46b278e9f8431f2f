"""Files of rows for the tests, and what sources give of them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from swift_dist.config.job import DataSection
from swift_dist.data.bad_rows import describe
from swift_dist.data.readers import BadRow
from swift_dist.data.rows import Row
from swift_dist.data.rows.source import RowSource, open_sources, read_rows
from tests.data.corpora import compress

ROWS = [{"query": f'What is {n}?\n漢字, "{n}" {"x" * (n % 7)}', "response": f"It is {n}.\té"} for n in range(40)]


def lines(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def cells(rows: list[dict], delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def write_parquet(path: Path, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)


def write_arrow(path: Path, rows: list[dict]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as stream, pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def written(data: Callable[[list[dict]], bytes], suffix: str = "") -> Callable[[Path, list[dict]], None]:
    return lambda path, rows: path.write_bytes(compress(data(rows), suffix, 3)) and None


KINDS: dict[str, Callable[[Path, list[dict]], None]] = {
    "c.jsonl": written(lines),
    "c.ndjson": written(lambda rows: b"\xef\xbb\xbf" + lines(rows).replace(b"\n", b"\r\n\n")),
    "c.json": written(lambda rows: json.dumps(rows, indent=1, ensure_ascii=False).encode()),
    "lines.json": written(lines),
    "c.csv": written(lambda rows: b"\xef\xbb\xbf" + cells(rows, ",")),
    "c.tsv": written(lambda rows: cells(rows, "\t")),
    "c.jsonl.gz": written(lines, ".gz"),
    "c.jsonl.zst": written(lines, ".zst"),
    "c.json.gz": written(lambda rows: json.dumps(rows).encode(), ".gz"),
    "lines.json.zst": written(lines, ".zst"),
    "c.csv.gz": written(lambda rows: cells(rows, ","), ".gz"),
    "c.parquet": write_parquet,
    "c.arrow": write_arrow,
    "saved": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path, num_shards=3),
    "folder": lambda path, rows: (path.mkdir(), [written(lines)(path / f"{k}.jsonl", rows[k::4]) for k in range(4)])[0],
}


def open_one(path: object, key: str = "data.train", **section: object) -> RowSource:
    data = DataSection.model_validate({"train": [{"path": str(path), "weight": 2.0}], **section})
    [source] = open_sources(data.train, data, key)
    return source


def read(source: RowSource) -> list[tuple[str, Row | BadRow]]:
    return [found for unit in source.units() for found in read_rows(source, unit)]


def asked(source: RowSource) -> list[str]:
    """The questions of the good rows, in order."""
    return [row.messages[0]["content"] for _, row in read(source) if isinstance(row, Row)]


def bad(source: RowSource) -> list[str]:
    """What is said of the bad rows, as the report has it; their origins say the same."""
    found = [(origin, row) for origin, row in read(source) if isinstance(row, BadRow)]
    said = describe([row for _, row in found])
    assert [f"{origin}: {row.reason}" for origin, row in found] == said
    return said
