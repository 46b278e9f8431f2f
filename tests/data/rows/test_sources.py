"""Sources: the same rows of every kind of file, in units that hold each once; bad rows in their place."""

from __future__ import annotations

import csv
import json
import os
import pickle
from pathlib import Path

import pytest

from swift_dist.data.rows.source import read_rows
from swift_dist.errors import JobError, RunError
from tests.data.corpora import compress
from tests.data.rows.files import KINDS, ROWS, asked, bad, lines, open_one, read, write_parquet


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    KINDS[kind](tmp_path / kind, ROWS)
    source = open_one(tmp_path / kind)
    assert (source.name, source.format) == (str(tmp_path / kind), "query_response")
    assert (source.weight, source.epochs) == (2, None)
    order = [row for k in range(4) for row in ROWS[k::4]] if kind == "folder" else ROWS
    assert [row.messages for _, row in read(source)] == [  # type: ignore[union-attr]
        ({"role": "user", "content": row["query"]}, {"role": "assistant", "content": row["response"]}) for row in order
    ]


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("kind", KINDS)
def test_units_hold_every_row_once_wherever_they_are_read(tmp_path: Path, kind: str) -> None:
    KINDS[kind](tmp_path / kind, ROWS)
    source = open_one(tmp_path / kind)
    units = source.units()
    whole = read(source)
    can_be_cut = kind in ("c.jsonl", "c.ndjson", "lines.json", "c.parquet", "c.arrow", "saved", "folder")
    assert len(units) >= 3 if can_be_cut else len(units) == 1
    assert len(whole) == len(ROWS) and len({origin for origin, _ in whole}) == len(ROWS)
    assert [unit.id for unit in units] == sorted({unit.id for unit in units})
    backwards = {}
    for unit in reversed(units):
        there = pickle.loads(pickle.dumps((source, unit)))
        backwards[unit.id] = list(read_rows(*there))
    assert [found for unit in units for found in backwards[unit.id]] == whole
    again = open_one(tmp_path / kind)
    assert again == source and again.units() == units


@pytest.mark.usefixtures("small_units")
def test_origins_are_lines(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(b"\n\n" + b"\n".join(lines([row]) for row in ROWS))
    text = (tmp_path / "c.jsonl").read_bytes().split(b"\n")
    for origin, row in read(open_one(tmp_path / "c.jsonl")):
        path, _, line = origin.rpartition(":")
        assert path == str(tmp_path / "c.jsonl")
        assert json.loads(text[int(line) - 1])["query"] == row.messages[0]["content"]  # type: ignore[union-attr]


def test_origins_in_tables_and_lists_are_rows(tmp_path: Path) -> None:
    for name in ("c.parquet", "c.json"):
        KINDS[name](tmp_path / name, ROWS)
        found = read(open_one(tmp_path / name))
        assert [origin for origin, _ in found] == [f"{tmp_path / name}: row {n + 1}" for n in range(len(ROWS))]


def test_lines_of_csv_files(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_bytes(b'query,response\n"a\nb",c\n\nd,e\n')
    assert [origin.rpartition(":")[2] for origin, _ in read(open_one(tmp_path / "c.csv"))] == ["2", "5"]


def test_lines_of_text(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes("eins \r\n\n  zwei é\ndrei".encode())
    source = open_one(tmp_path / "c.txt")
    assert source.format == "text"
    assert [row.text for _, row in read(source)] == ["eins ", "  zwei é", "drei"]  # type: ignore[union-attr]


def test_tables_without_what_other_rows_have(tmp_path: Path) -> None:
    """A table's structs have the keys of all rows; those that are null were never written."""
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": calls}]},
    ]
    write_parquet(tmp_path / "c.parquet", rows)
    found = [list(row.messages) for _, row in read(open_one(tmp_path / "c.parquet"))]  # type: ignore[union-attr]
    assert found == [row["messages"] for row in rows]


LINES = lines(ROWS).split(b"\n")[:-1]
BAD_LINES = {
    "half a row": (b'{"query": "cut of', "not JSON"),
    "a list": (b'["q", "a"]', "not a JSON object but an array"),
    "not UTF-8": (b'{"query": "\xff", "response": "a"}', "not UTF-8"),
    "half a surrogate pair": (b'{"query": "\\ud83d", "response": "a"}', "half a surrogate pair"),
    "nested": (b"[" * 100_000, "nested too deeply"),
    "other columns": (b'{"premise": "t"}', "no query, only premise"),
    "empty answer": (b'{"query": "q", "response": ""}', "response is empty"),
}


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines_are_named_and_the_rest_is_read(tmp_path: Path, name: str, suffix: str) -> None:
    line, reason = BAD_LINES[name]
    file = tmp_path / f"c.jsonl{suffix}"
    file.write_bytes(compress(b"\n".join([line, *LINES[:30], b"", line, *LINES[30:]]), suffix))
    source = open_one(file)
    said = bad(source)
    assert [text.split(": ")[0] for text in said] == [f"{file}:1", f"{file}:33"]
    assert all(reason in text for text in said)
    assert asked(source) == [row["query"] for row in ROWS]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_cut_off_file_says_so_and_gives_what_it_has(tmp_path: Path, suffix: str) -> None:
    rows = [{"query": os.urandom(400).hex(), "response": "a"} for _ in range(400)]
    file = tmp_path / f"c.jsonl{suffix}"
    whole = compress(lines(rows), suffix, 5)
    file.write_bytes(whole[: len(whole) * 3 // 4])
    source = open_one(file)
    good = asked(source)
    assert good == [row["query"] for row in rows[: len(good)]] and 0 < len(good) < 400
    assert bad(source) == [f"{file}:{len(good) + 1}: the rest is lost: the compressed file is cut off"]
    # told also where only some rows are taken
    assert len(bad(open_one(f"{file}#3"))) == 1 and len(asked(open_one(f"{file}#3"))) == 3


def test_bad_entries_of_a_list(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    parts = [json.dumps(row) for row in ROWS[:3]]
    file.write_text(f"[{parts[0]}, 3, {parts[1]}")
    assert bad(open_one(file)) == [
        f"{file}: row 2: not a JSON object but a number",
        f"{file}: row 4: the list does not end here with ], so the rest is lost",
    ]
    file.write_text(f"[{parts[0]}, {{, {parts[1]}]")
    assert [text.split(": not JSON")[0] for text in bad(open_one(file))] == [f"{file}: row 2"]
    file.write_bytes(f"[{parts[0]},".encode() + b'{"query": "\xff", "response": "a"}' + f", {parts[2]}]".encode())
    source = open_one(file)
    assert len(asked(source)) == 2 and bad(source)[0].startswith(f"{file}: row 2: not UTF-8")


def test_bad_records_of_csv(tmp_path: Path) -> None:
    file = tmp_path / "c.csv"
    file.write_bytes(b'query,response\nq,a\nq\nq,\xff\nq,\nq,b,c\n"q"x,a\n"q2",' + b"y" * 200_000 + b'\n"open,a\n')
    limit = csv.field_size_limit()
    said = bad(open_one(file))
    assert [text.removeprefix(f"{file}:").split(":")[0] for text in said] == ["3", "4", "5", "6", "7", "9"]
    assert "1 cells, but 2 columns" in said[0] and "not UTF-8" in said[1] and "no response" in said[2]
    assert "3 cells" in said[3] and "not CSV" in said[4] and "not CSV: unexpected end of data" in said[5]
    assert asked(open_one(file)) == ["q", "q2"]
    assert csv.field_size_limit() == limit
    file.write_bytes(b"query,query\nq,a\n")
    with pytest.raises(JobError, match="names a column twice"):
        open_one(file)


@pytest.mark.usefixtures("small_units")
def test_bad_rows_of_tables(tmp_path: Path) -> None:
    file = tmp_path / "c.parquet"
    write_parquet(file, [*ROWS[:20], {"query": "q", "response": None}, *ROWS[20:]])
    source = open_one(file)
    assert bad(source) == [f"{file}: row 21: no response, only query"]
    assert asked(source) == [row["query"] for row in ROWS]


def test_what_often_goes_wrong_is_said(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_bytes(lines([ROWS[0], {"instruction": "i", "output": "o"}, {"text": "t"}]))
    assert bad(open_one(file)) == [
        f"{file}:2: no query, only instruction, output (it looks like alpaca, the source is query_response)",
        f"{file}:3: no query, only text (it looks like text, the source is query_response)",
    ]
    (tmp_path / "c.csv").write_text("query;response\nq;a\n")
    with pytest.raises(JobError, match="commas between its cells"):
        open_one(tmp_path / "c.csv")
    (tmp_path / "c.json").write_text(json.dumps({"data": ROWS[:2]}, indent=1))
    with pytest.raises(JobError, match=r"a \.json file holds a list of rows, or a row a line"):
        open_one(tmp_path / "c.json")


def test_files_that_change_are_noticed(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_bytes(lines(ROWS))
    source = open_one(file)
    [unit] = source.units()
    file.write_bytes(lines(ROWS[1:]))
    with pytest.raises(RunError, match="changed since it was found"):
        list(read_rows(source, unit))
    file.unlink()
    with pytest.raises(RunError, match="cannot read"):
        list(read_rows(source, unit))


def test_a_json_file_that_is_damaged_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    (tmp_path / "c.json.gz").write_bytes(b"\x1f\x8b" + os.urandom(40))
    with pytest.raises(JobError, match=r"c\.json\.gz: row 1: the rest is lost"):
        open_one(tmp_path / "c.json.gz")
