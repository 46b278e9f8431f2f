"""`data prepare` against megatron.core's own builder, for every kind of input and however the work is cut."""

from __future__ import annotations

import hashlib
import json
import sys
import types
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from swift_dist.data import preparation
from swift_dist.data.prepare import PrepareOptions, prepare, render
from swift_dist.errors import JobError
from tests.data.corpora import compress, files, jsonl, megatron, stored, texts


def run(source: object, output: Path, tokenizer: str, **more: object) -> dict:
    inputs = [source] if isinstance(source, (str, Path)) else source
    given = {"input": [str(path) for path in inputs], "output": str(output), "tokenizer": tokenizer, "workers": 1}  # type: ignore[attr-defined]
    return prepare(PrepareOptions.model_validate({**given, **more}))


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch):
    """Cut the input into units of that many bytes."""
    return lambda size: monkeypatch.setattr(preparation, "unit_size", lambda found: size)


@pytest.fixture(autouse=True)
def fast_workers(request: pytest.FixtureRequest) -> None:
    """Most tests are about what comes out: their workers are threads of the test."""
    if "processes" not in request.node.name:
        request.getfixturevalue("inline_workers")


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("size", [100, 1009, 1 << 20])
def test_jsonl(tmp_path: Path, tokenizer: str, small_units, suffix: str, size: int, members: int) -> None:
    """Units of 100 bytes end inside characters and inside rows, and many rows are longer than a unit."""
    documents = texts(60)
    source = tmp_path / f"c.jsonl{suffix}"
    source.write_bytes(compress(jsonl(documents), suffix, members))
    small_units(size)
    result = run(source, tmp_path / "out", tokenizer, workers=2)
    assert files(tmp_path / "out") == megatron(tmp_path / "ref", documents, tokenizer)
    assert result["documents"] == 60 and result["skipped"] == 0
    assert result["text_bytes"] == sum(len(text.encode()) for text in documents)
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.bin", "out.idx", "out.manifest.json"]


def test_worker_processes_make_the_same(tmp_path: Path, tokenizer: str, small_units) -> None:
    documents = texts(200)
    (tmp_path / "a.jsonl").write_bytes(jsonl(documents[:150]))
    (tmp_path / "b.jsonl.gz").write_bytes(compress(jsonl(documents[150:]), ".gz"))
    small_units(900)
    run([tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"], tmp_path / "out", tokenizer, workers=3)
    assert files(tmp_path / "out") == megatron(tmp_path / "ref", documents, tokenizer)


SHAPES = {
    "no newline at the end": lambda raw: raw.rstrip(b"\n"),
    "CRLF": lambda raw: raw.replace(b"\n", b"\r\n"),
    "blank lines": lambda raw: b"\n\n" + raw.replace(b"\n", b"\n  \n"),
    "BOM": lambda raw: b"\xef\xbb\xbf" + raw,
}


@pytest.mark.parametrize("suffix", ["", ".zst"])
@pytest.mark.parametrize("shape", SHAPES)
def test_jsonl_as_other_systems_write_it(tmp_path: Path, tokenizer: str, small_units, shape: str, suffix: str) -> None:
    documents = texts(40, seed=1)
    source = tmp_path / f"c.jsonl{suffix}"
    source.write_bytes(compress(SHAPES[shape](jsonl(documents, ascii_only=True)), suffix))
    small_units(500)
    run(source, tmp_path / "out", tokenizer)
    assert files(tmp_path / "out") == megatron(tmp_path / "ref", documents, tokenizer)


@pytest.mark.parametrize("size", [50, 400, 1 << 20])
def test_parquet_and_arrow(tmp_path: Path, tokenizer: str, small_units, size: int) -> None:
    documents = texts(90, seed=2)
    table = pa.table({"n": list(range(90)), "content": documents})
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=7)
    from datasets import Dataset, DatasetDict

    Dataset(table).save_to_disk(str(tmp_path / "hf"), num_shards=3)
    DatasetDict({"train": Dataset(table), "other": Dataset(table.slice(0, 5))}).save_to_disk(str(tmp_path / "dict"))
    small_units(size)
    reference = megatron(tmp_path / "ref", documents, tokenizer)
    category = table.set_column(1, "content", table["content"].dictionary_encode())
    pq.write_table(category, tmp_path / "category.parquet", row_group_size=50)
    for name in ("c.parquet", "hf", "dict", "category.parquet"):
        run(tmp_path / name, tmp_path / f"out_{name}", tokenizer, text_key="content")
        assert files(tmp_path / f"out_{name}") == reference
    run(tmp_path / "dict", tmp_path / "other", tokenizer, text_key="content", dataset_split="other")
    assert files(tmp_path / "other") == megatron(tmp_path / "ref5", documents[:5], tokenizer)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("size", [10, 300, 1 << 20])
def test_plain_text(tmp_path: Path, tokenizer: str, small_units, size: int, suffix: str) -> None:
    paragraphs = ["one line", "two\nlines é", "x", " indented\n  more 漢字", "the end 🙂" * 30]
    source = tmp_path / f"c.txt{suffix}"
    raw = "\r\n \t\r\n\r\n".join(p.replace("\n", "\r\n") for p in paragraphs).encode()
    source.write_bytes(compress(b"\r\n\r\n" + raw + b"\r\n", suffix))
    small_units(size)
    run(source, tmp_path / "paragraphs", tokenizer, text_unit="paragraph")
    assert files(tmp_path / "paragraphs") == megatron(tmp_path / "ref_p", paragraphs, tokenizer)
    run(source, tmp_path / "lines", tokenizer, text_unit="line")
    lines = [line for p in paragraphs for line in p.split("\n")]
    assert files(tmp_path / "lines") == megatron(tmp_path / "ref_l", lines, tokenizer)
    run(source, tmp_path / "file", tokenizer)
    assert (
        files(tmp_path / "file")
        == megatron(tmp_path / "ref_f", ["\n\n" + raw.decode().replace("\r\n", "\n") + "\n"], tokenizer)[:2]
    )


def test_folders_and_several_inputs(tmp_path: Path, tokenizer: str, small_units) -> None:
    """Files of a folder by path, hidden ones left out; many small files share a unit."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name, words in (
        ("b.txt", "bee"),
        ("a.txt", "ay"),
        ("sub/c.txt", "see"),
        (".hidden.txt", "no"),
        ("d.png", "no"),
    ):
        (folder / name).write_text(words)
    (folder / "e.jsonl.gz").write_bytes(compress(jsonl(["ee", "eee"]), ".gz"))
    (tmp_path / "last.jsonl").write_bytes(jsonl(["z"]))
    for size in (4, 1 << 20):
        small_units(size)
        run([folder, tmp_path / "last.jsonl"], tmp_path / f"out{size}", tokenizer)
        expected = ["ay", "bee", "ee", "eee", "see", "z"]
        assert files(tmp_path / f"out{size}") == megatron(tmp_path / "ref", expected, tokenizer)
    run(folder, tmp_path / "png", tokenizer, glob="*.png", format="text")
    assert files(tmp_path / "png") == megatron(tmp_path / "ref", ["no"], tokenizer)


def test_hub_datasets_are_read_from_the_librarys_cache(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub itself is out of reach of a test: `load_dataset` and ModelScope's `MsDataset` are stood in for."""
    import datasets

    documents = texts(30, seed=3)
    datasets.Dataset(pa.table({"text": documents})).save_to_disk(str(tmp_path / "cache"))
    asked: list[object] = []

    def load(name: str, config: str | None = None, split: str = "", subset_name: str | None = None):
        asked.append((name, config or subset_name, split))
        return datasets.load_from_disk(str(tmp_path / "cache"))

    fake = types.ModuleType("modelscope.msdatasets")
    fake.MsDataset = types.SimpleNamespace(load=load)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", types.ModuleType("modelscope"))
    monkeypatch.setitem(sys.modules, "modelscope.msdatasets", fake)
    monkeypatch.setattr(datasets, "load_dataset", load)
    reference = megatron(tmp_path / "ref", documents, tokenizer)
    for scheme in ("hf", "ms"):
        source = f"{scheme}://owner/name"
        run([source], tmp_path / scheme, tokenizer, dataset_config="en", dataset_split="test")
        assert files(tmp_path / scheme) == reference
    assert asked == [("owner/name", "en", "test")] * 2
    monkeypatch.setitem(sys.modules, "modelscope.msdatasets", None)
    with pytest.raises(JobError, match=r"swift-dist\[modelscope\]"):
        run(["ms://owner/name"], tmp_path / "none", tokenizer)


def test_end_of_document(tmp_path: Path, tokenizer: str) -> None:
    documents = texts(40)
    source = tmp_path / "c.jsonl"
    source.write_bytes(jsonl(documents))
    run(source, tmp_path / "out", tokenizer, append_eod=True)
    assert files(tmp_path / "out") == megatron(tmp_path / "ref", documents, tokenizer, eod=True)
    eod = Tokenizer.from_file(f"{tokenizer}/tokenizer.json").token_to_id("<|endoftext|>")
    assert json.loads((tmp_path / "out.manifest.json").read_text())["eod_id"] == eod


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_shuffle_is_a_permutation_by_the_seed_alone(tmp_path: Path, tokenizer: str, small_units, suffix: str) -> None:
    from swift_dist.data import merge

    documents = [f"document {k} " + "word " * (k % 7) for k in range(200)]
    source = tmp_path / f"c.jsonl{suffix}"
    source.write_bytes(compress(jsonl(documents), suffix))
    run(source, tmp_path / "plain", tokenizer)
    run(source, tmp_path / "a", tokenizer, shuffle=True)
    small_units(333)
    run(source, tmp_path / "b", tokenizer, shuffle=True, workers=2)
    patch = pytest.MonkeyPatch()
    patch.setattr(merge, "_BUCKET_BYTES", 500)
    run(source, tmp_path / "c", tokenizer, shuffle=True)
    patch.undo()
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "c")
    plain, shuffled = stored(tmp_path / "plain"), stored(tmp_path / "a")
    assert plain != shuffled and Counter(plain) == Counter(shuffled)
    places = [plain.index(document) for document in shuffled]
    assert sum(abs(place - k) for k, place in enumerate(places)) / 200 > 40  # 67 for a random one
    run(source, tmp_path / "d", tokenizer, shuffle=True, seed=7)
    assert files(tmp_path / "d") != files(tmp_path / "a")


@pytest.mark.parametrize("shuffle", [False, True])
def test_splits_share_out_every_document(tmp_path: Path, tokenizer: str, small_units, shuffle: bool) -> None:
    documents = [f"document {k}" for k in range(300)]
    source = tmp_path / "c.jsonl"
    source.write_bytes(jsonl(documents))
    run(source, tmp_path / "all", tokenizer)
    result = run(source, tmp_path / "out", tokenizer, split="0.8,0.15,0.05", shuffle=shuffle)
    small_units(444)
    run(source, tmp_path / "again", tokenizer, split=(80, 15, 5), shuffle=shuffle, workers=2)
    assert list(result["datasets"]) == ["train", "validation", "test"]
    found: list[tuple[int, ...]] = []
    for name, share in (("train", 240), ("validation", 45), ("test", 15)):
        prefix = tmp_path / f"out_{name}"
        assert files(prefix) == files(tmp_path / f"again_{name}")
        part = stored(prefix)
        assert abs(len(part) - share) < 25 and result["datasets"][name]["documents"] == len(part)
        if not shuffle:
            assert part == [d for d in stored(tmp_path / "all") if d in set(part)]
        found += part
        facts = json.loads(Path(f"{prefix}.manifest.json").read_text())
        assert facts["documents"] == len(part) and facts["split"] == name
    assert Counter(found) == Counter(stored(tmp_path / "all"))
    assert not (tmp_path / "out.bin").exists()
    assert set(json.loads((tmp_path / "out.manifest.json").read_text())["datasets"]) == {"train", "validation", "test"}


def test_manifest_and_result(tmp_path: Path, tokenizer: str) -> None:
    documents = texts(50)
    source = tmp_path / "c.jsonl"
    source.write_bytes(jsonl(documents))
    result = run(source, tmp_path / "out", tokenizer)
    facts = json.loads((tmp_path / "out.manifest.json").read_text())

    def sha(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    assert facts["inputs"] == [{"path": str(source), "bytes": source.stat().st_size, "sha256": sha(source)}]
    for suffix in ("bin", "idx"):
        path = tmp_path / f"out.{suffix}"
        assert facts["outputs"][suffix] == {"path": path.name, "bytes": path.stat().st_size, "sha256": sha(path)}
    rows = stored(tmp_path / "out")
    assert facts["documents"] == result["documents"] == len(rows)
    assert facts["tokens"] == result["tokens"] == sum(map(len, rows))
    assert facts["max_token_id"] == max(max(row) for row in rows if row)
    assert facts["empty_documents"] == documents.count("")
    assert facts["dtype"] == "uint16" and facts["eod_id"] is None and facts["vocab_size"] > 300
    assert "50 documents" in render(result)
    # The same command again finds its work done; it says so and leaves the files alone.
    before = (tmp_path / "out.bin").stat().st_mtime_ns
    again = run(source, tmp_path / "out", tokenizer, workers=2)
    assert again["already_done"] and again["tokens"] == result["tokens"] and "nothing to do" in render(again)
    assert (tmp_path / "out.bin").stat().st_mtime_ns == before


def test_training_reads_what_was_prepared(tmp_path: Path, tokenizer: str) -> None:
    from swift_dist.config.job import DataSection
    from swift_dist.data.mixture import check_data

    source = tmp_path / "c.jsonl"
    source.write_bytes(jsonl(texts(50)))
    result = run(source, tmp_path / "out", tokenizer, append_eod=True)
    section = DataSection(train=[{"path": str(tmp_path / "out"), "epochs": 1}], sequence_length=16, mask_eod_loss=True)
    assert check_data(section, global_batch_size=4, vocab_size=600) == (result["tokens"] - 1) // 16 // 4
    with pytest.raises(JobError, match="vocabulary"):
        check_data(section, global_batch_size=4, vocab_size=290)


def test_importing_the_options_is_cheap() -> None:
    import subprocess

    code = (
        "import sys, swift_dist.data.prepare, swift_dist.data.tokenizer;"
        "heavy = {'numpy', 'torch', 'ray', 'datasets', 'tokenizers', 'transformers', 'pyarrow'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
