"""What paths of data.train name: some of the rows, subsets, splits, hubs; and what makes two sources the same."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import datasets
import pytest

from swift_dist.config.job import DataSection
from swift_dist.data import hub
from swift_dist.data.rows.paths import absolute_address
from swift_dist.data.rows.source import open_sources
from swift_dist.errors import JobError
from tests.data.rows.files import KINDS, ROWS, asked, bad, lines, open_one, read, write_arrow, write_parquet


@pytest.mark.parametrize("kind", ["c.jsonl", "c.csv", "c.json.gz", "c.parquet", "folder"])
@pytest.mark.usefixtures("small_units")
def test_some_of_the_rows(tmp_path: Path, kind: str) -> None:
    """#N: a fixed choice in file order; beyond what there is, whole passes and a choice once more."""
    KINDS[kind](tmp_path / kind, ROWS)
    whole = asked(open_one(tmp_path / kind))
    taken = {n: asked(open_one(f"{tmp_path / kind}#{n}")) for n in (1, 7, 13, 40, 47, 93)}
    assert {n: len(rows) for n, rows in taken.items()} == {n: n for n in taken}
    for n in (1, 7, 13):
        assert taken[n] == [text for text in whole if text in taken[n]]
        assert set(taken[n]) <= set(taken[13])  # more rows are those and others
    assert taken[13] != whole[:13]
    assert taken[40] == whole and taken[47] == whole + taken[7] and taken[93] == whole + whole + taken[13]
    units = open_one(f"{tmp_path / kind}#93").units()
    assert [unit.id for unit in units] == sorted({unit.id for unit in units})


def test_addresses(tmp_path: Path) -> None:
    """A colon or a # in a name is part of it where a file of that name exists."""
    for name in ("a:b#3.jsonl", "x#2", "y:z"):
        folder = tmp_path / name
        if name.endswith(".jsonl"):
            folder.write_bytes(lines(ROWS))
        else:
            folder.mkdir()
            (folder / "c.jsonl").write_bytes(lines(ROWS[:5]))
            (folder / "sub").mkdir()
            (folder / "sub" / "d.jsonl").write_bytes(lines(ROWS[5:8]))
    lengths = {"a:b#3.jsonl": 40, "a:b#3.jsonl#4": 4, "x#2": 8, "x#2#6": 6, "y:z:sub": 3, "y:z:sub#2": 2}
    for path, count in lengths.items():
        assert len(asked(open_one(tmp_path / path))) == count, path
        assert absolute_address(str(tmp_path / path), "data.train") == str(tmp_path / path)


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.jsonl").write_bytes(lines(ROWS))
    monkeypatch.chdir(tmp_path)
    assert absolute_address("c.jsonl#3", "data.train") == f"{tmp_path}/c.jsonl#3"
    source = open_one("c.jsonl#3")
    assert (source.name, source.take) == ("c.jsonl#3", 3)
    monkeypatch.chdir("/")
    assert len(asked(source)) == 3


def test_splits(tmp_path: Path) -> None:
    """Of what holds several splits only the wanted one is read."""
    saved = {"train": ROWS[:5], "validation": ROWS[5:8], "test": ROWS[8:10]}
    splits = {name: datasets.Dataset.from_list(rows) for name, rows in saved.items()}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    (tmp_path / "hub" / "dataset_infos.json").write_text("{}")
    (tmp_path / "hub" / "README.md").write_text("# Read me")
    for name, file in {"train": "train-00000-of-00001", "validation": "dev", "test": "my_test"}.items():
        write_parquet(tmp_path / "hub" / "data" / f"{file}.parquet", saved[name])
    for folder in ("saved", "hub"):
        path = tmp_path / folder
        assert len(asked(open_one(path))) == 5
        assert len(asked(open_one(path, "data.validation"))) == 3
        assert len(asked(open_one(f"{path}::test"))) == 2
        assert len(asked(open_one(f"{path}::test#1", "data.validation"))) == 1
        with pytest.raises(JobError, match="other"):
            open_one(f"{path}::other")
    assert len(asked(open_one(f"{tmp_path / 'saved'}:test"))) == 2  # the subfolder
    (tmp_path / "hub" / "data" / "more.parquet").write_bytes((tmp_path / "hub" / "data" / "dev.parquet").read_bytes())
    with pytest.raises(JobError, match=r"holds files of splits, and beside them .*more\.parquet"):
        open_one(tmp_path / "hub")


def test_fingerprints_are_of_content(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
    first, second = tmp_path / "a" / "one.jsonl", tmp_path / "b" / "two.jsonl"
    first.write_bytes(lines(ROWS))
    shutil.copy(first, second)
    os.utime(second, (1, 1))
    same = open_one(first).fingerprint()
    assert open_one(second).fingerprint() == same
    others = {
        "take": open_one(f"{first}#5").fingerprint(),
        "another take": open_one(f"{first}#6").fingerprint(),
        "columns": open_one(first, columns={"prompt": "query"}).fingerprint(),
        "format": open_one(first, format="swift_dist.data.rows.query_response:FORMAT").fingerprint(),
    }
    text = second.read_bytes()
    second.write_bytes(text.replace(b"What is 7?", b"What is 8?"))
    others["one byte"] = open_one(second).fingerprint()
    (tmp_path / "b" / "three.jsonl").write_bytes(lines(ROWS[:1]))
    others["a file more"] = open_one(tmp_path / "b").fingerprint()
    shutil.copy(first, tmp_path / "c.txt")
    others["read as text"] = open_one(tmp_path / "c.txt").fingerprint()
    assert len({same, *others.values()}) == 1 + len(others)


def test_rows_are_not_compared_across_borders_of_files(tmp_path: Path) -> None:
    """The same bytes shared out otherwise are other files: a row may be cut in two."""
    for place, cut in (("a", 10), ("b", 11)):
        (tmp_path / place).mkdir()
        (tmp_path / place / "1.txt").write_bytes(b"x" * cut)
        (tmp_path / place / "2.txt").write_bytes(b"x" * (20 - cut))
    assert open_one(tmp_path / "a").fingerprint() != open_one(tmp_path / "b").fingerprint()


def test_columns(tmp_path: Path) -> None:
    rows = [{"frage": "q", "antwort": "a", "response": "not this"}, {"frage": "r", "antwort": "b", "lang": "de"}]
    (tmp_path / "c.jsonl").write_bytes(lines(rows))
    source = open_one(tmp_path / "c.jsonl", columns={"query": "frage", "response": "antwort"})
    assert [[m["content"] for m in row.messages] for _, row in read(source)] == [["q", "a"], ["r", "b"]]  # type: ignore[union-attr]
    swapped = open_one(tmp_path / "c.jsonl", columns={"query": "antwort", "response": "frage"})
    assert [m["content"] for m in read(swapped)[0][1].messages] == ["a", "q"]  # type: ignore[union-attr]
    columns = {"query": "frage", "response": "antwort", "system": "lang"}  # which only the second row has
    assert read(open_one(tmp_path / "c.jsonl", columns=columns))[1][1].messages[0]["content"] == "de"  # type: ignore[union-attr]
    with pytest.raises(JobError, match=r"^data\.columns: system is to be the column speech, which no row has"):
        open_one(tmp_path / "c.jsonl", columns={**columns, "system": "speech"})
    with pytest.raises(JobError, match=r"^data\.columns: no format knows a column querry"):
        open_one(tmp_path / "c.jsonl", columns={"querry": "frage"})


def test_the_first_good_row_decides_and_a_format_can_be_said(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    rows = [{"query": "q", "response": ""}, {"instruction": "i", "output": "a"}, {"query": "q", "response": "b"}]
    file.write_bytes(b"no row\n" + lines(rows))
    source = open_one(file)
    assert source.format == "alpaca" and len(bad(source)) == 3
    source = open_one(file, format="query_response")
    assert source.format == "query_response" and asked(source) == ["q"]
    with pytest.raises(JobError, match=r"of its first rows none can be used\n  .*c\.jsonl:1: not JSON") as caught:
        open_one(file, format="kto")
    assert caught.value.key == "data.train" and "no label" in str(caught.value)


WRONG = {
    "missing": ("no.jsonl", {}, "data.train", "no.jsonl does not exist"),
    "nearly of the catalogue": ("gsm8", {}, "data.train", "did you mean gsm8k of the catalogue?"),
    "#": ("good.jsonl#few", {}, "data.train", "what follows # is not a number of rows"),
    "#0": ("good.jsonl#0", {}, "data.train", "not a number of rows"),
    "subset of a file": ("good.jsonl:sub", {}, "data.train", "is a file, which has no subsets"),
    "no subfolder": ("mixed:sub", {}, "data.train", "there is no folder"),
    "unknown kind": ("data.xyz", {}, "data.train", "cannot tell from its name"),
    "empty": ("empty.jsonl", {}, "data.train", "there is no text in it"),
    "blank": ("blank.jsonl", {}, "data.train", "there are no rows in it"),
    "empty folder": ("nothing", {}, "data.train", "no file in"),
    "mixed folder": ("mixed", {}, "data.train", "files of several kinds: jsonl, text"),
    "no parquet": ("no.parquet", {}, "data.train", "not a readable parquet file"),
    "no known columns": ("odd.jsonl", {}, "data.train", "no format knows the columns premise, hypothesis"),
    "a label of what": ("label.jsonl", {}, "data.train", "data.format kto or classification says"),
    "unknown format": ("good.jsonl", {"format": "alpacca"}, "data.format", "did you mean alpaca?"),
    "catalogue otherwise": ("gsm8k", {"format": "alpaca"}, "data.format", "alpaca, but gsm8k is query_response"),
    "catalogue elsewhere": ("ms://smoltalk", {}, "data.train", "no id of smoltalk on ModelScope"),
    "too many fields": ("hf://a/b:c:d:e", {}, "data.train", "nor owner/name:subset:split"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path, section, key, words = WRONG[name]
    (tmp_path / "good.jsonl").write_bytes(lines(ROWS))
    for folder in ("nothing", "mixed"):
        (tmp_path / folder).mkdir()
    (tmp_path / "mixed" / "a.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "mixed" / "LICENSE.txt").write_text("You may.")
    texts = {"data.xyz": "x", "empty.jsonl": "", "blank.jsonl": "\n\n", "no.parquet": "x" * 100}
    texts["odd.jsonl"] = '{"premise": "a", "hypothesis": "b"}'
    texts["label.jsonl"] = '{"query": "a", "response": "b", "label": 1}'
    for file, text in texts.items():
        (tmp_path / file).write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JobError) as caught:
        open_one(path, **section)
    assert caught.value.key == key and words in caught.value.message and caught.value.remedy


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What the hubs were asked for; they give a small file."""
    asked_for: list[tuple] = []

    def arrow_files(address: str, config: str | None, split: str) -> list[Path]:
        asked_for.append((address, config, split))
        write_arrow(tmp_path / "hub.arrow", [{"question": "q", "answer": "a", "problem": "p", "solution": "s"}])
        return [tmp_path / "hub.arrow"]

    monkeypatch.setattr(hub, "arrow_files", arrow_files)
    return asked_for


@pytest.mark.parametrize(
    ("path", "key", "request_", "question"),
    [
        ("hf://me/mine", "data.train", ("hf://me/mine", None, "train"), "q"),
        ("ms://me/mine:sub#3", "data.validation", ("ms://me/mine", "sub", "validation"), "q"),
        ("hf://me/mine:sub:dev", "data.train", ("hf://me/mine", "sub", "dev"), "q"),
        ("hf://me/mine::dev", "data.train", ("hf://me/mine", None, "dev"), "q"),
        ("gsm8k", "data.train", ("hf://openai/gsm8k", "main", "train"), "q"),
        ("openai/gsm8k:socratic#1", "data.train", ("hf://openai/gsm8k", "socratic", "train"), "q"),
        ("ms://gsm8k::test", "data.train", ("ms://modelscope/gsm8k", "main", "test"), "q"),
        ("math", "data.train", ("hf://DigitalLearningGmbH/MATH-lighteval", None, "train"), "p"),
    ],
)
def test_datasets_of_hubs(fetched: list[tuple], path: str, key: str, request_: tuple, question: str) -> None:
    source = open_one(path, key)
    assert fetched == [request_]
    assert asked(source) == [question] * (source.take or 1)


def test_a_dataset_of_the_catalogue_without_validation(fetched: list[tuple]) -> None:
    with pytest.raises(JobError, match=r"gsm8k has no split for validation\n.*split_ratio"):
        open_one("gsm8k", "data.validation")
    assert fetched == []


def test_the_catalogue_and_files_together(fetched: list[tuple], tmp_path: Path) -> None:
    """data.columns and data.format are of what the catalogue does not list."""
    (tmp_path / "c.jsonl").write_bytes(lines([{"frage": "x", "response": "y"}]))
    data = DataSection.model_validate({"train": [str(tmp_path / "c.jsonl"), "math"], "columns": {"query": "frage"}})
    sources = open_sources(data.train, data, "data.train")
    assert [asked(source) for source in sources] == [["x"], ["p"]]
    assert [dict(source.columns)["query"] for source in sources] == ["frage", "problem"]
    with pytest.raises(JobError, match=r"^data\.columns: query is to be the column frage, which no row has"):
        open_one("math", columns={"query": "frage"})
