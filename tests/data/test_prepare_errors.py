"""What `data prepare` says to wrong commands and corrupt input. It leaves nothing by the output's name."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from swift_dist.data import merge, parts, preparation
from swift_dist.data.prepare import PrepareOptions, prepare
from swift_dist.errors import JobError, RunError
from swift_dist.workers import pool
from swift_dist.workers.pool import LocalWorker
from tests.data.corpora import compress, files, jsonl, megatron, texts

pytestmark = pytest.mark.usefixtures("inline_workers")


def run(source: object, output: Path, tokenizer: str, **more: object) -> dict:
    inputs = [source] if isinstance(source, (str, Path)) else source
    given = {"input": [str(path) for path in inputs], "output": str(output), "tokenizer": tokenizer, "workers": 1}  # type: ignore[attr-defined]
    return prepare(PrepareOptions.model_validate({**given, **more}))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_address_without_ray(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "c.jsonl").write_bytes(jsonl(texts(3)))
    with pytest.raises(JobError, match=r"^ray_address: is not read with launcher local"):
        run(tmp_path / "c.jsonl", tmp_path / "out", tokenizer, ray_address="127.0.0.1:1")
    assert names(tmp_path) == ["c.jsonl"]


BAD_LINES = {
    "half a row": (b'{"text": "cut of', "not JSON"),
    "not an object": (b'["text"]', "not a JSON object but an array"),
    "no key": (b'{"id": 3, "txt": "x"}', "no key 'text', only id, txt"),
    "null": (b'{"text": null}', "'text' holds null, not text"),
    "a number": (b'{"text": 3}', "'text' holds a number, not text"),
    "not UTF-8": (b'{"text": "\xff\xfe"}', "not UTF-8 (byte 10 of the line)"),
    "half a surrogate pair": (b'{"text": "\\ud83d"}', "half a surrogate pair"),
    "nested": (b"[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_rows_are_named_by_file_and_line(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch, name: str, suffix: str
) -> None:
    bad, reason = BAD_LINES[name]
    documents = texts(60)
    lines = jsonl(documents).split(b"\n")
    raw = b"\n".join([*lines[:31], bad, *lines[31:50], b"", bad, *lines[50:]])
    source = tmp_path / "in" / f"c.jsonl{suffix}"
    source.parent.mkdir()
    source.write_bytes(compress(raw, suffix))
    monkeypatch.setattr(preparation, "unit_size", lambda found: 800)
    with pytest.raises(RunError) as caught:
        run(source, tmp_path / "out", tokenizer)
    assert caught.value.message.startswith(f"{source}:32: ") and reason in caught.value.message
    assert "--on_error skip" in caught.value.remedy
    assert names(tmp_path) == ["in", "out.work"]  # what is done stays for the next run
    result = run(source, tmp_path / "out", tokenizer, on_error="skip")
    assert result["skipped"] == 2
    facts = json.loads((tmp_path / "out.manifest.json").read_text())["skipped"]
    assert [row.split(": ")[0] for row in facts["rows"]] == [f"{source}:32", f"{source}:53"] and facts["count"] == 2
    assert files(tmp_path / "out") == megatron(tmp_path / "ref", documents, tokenizer)
    # To be strict again is another matter: the rows are still bad.
    with pytest.raises((JobError, RunError)):
        run(source, tmp_path / "out", tokenizer)


@pytest.mark.parametrize("size", [20000, 1 << 25])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_cut_off_file_is_never_taken_for_whole(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch, suffix: str, size: int
) -> None:
    documents = texts(80, longest=2000)  # several blocks of zstd
    whole = compress(jsonl(documents), suffix)
    source = tmp_path / f"c.jsonl{suffix}"
    source.write_bytes(whole[: len(whole) * 2 // 3])
    monkeypatch.setattr(preparation, "unit_size", lambda found: size)
    with pytest.raises(RunError, match="cut off") as caught:
        run(source, tmp_path / "out", tokenizer)
    assert caught.value.message.startswith(f"{source}:")
    result = run(source, tmp_path / "out", tokenizer, on_error="skip")
    assert result["skipped"] == 1 and 0 < result["documents"] < 80
    assert files(tmp_path / "out") == megatron(tmp_path / "ref", documents[: result["documents"]], tokenizer)
    # damage in the middle
    raw = bytearray(whole)
    raw[len(raw) // 2] ^= 0xFF
    raw[len(raw) // 2 + 9] ^= 0xFF
    source.write_bytes(bytes(raw))
    with pytest.raises(RunError, match=str(source)):
        run(source, tmp_path / "other", tokenizer)


def test_bad_rows_of_tables(tmp_path: Path, tokenizer: str) -> None:
    documents = texts(40)
    pq.write_table(
        pa.table({"text": [*documents[:20], None, *documents[20:]]}), tmp_path / "c.parquet", row_group_size=9
    )
    with pytest.raises(RunError, match=r"c\.parquet: row 21: 'text' holds null"):
        run(tmp_path / "c.parquet", tmp_path / "out", tokenizer)
    assert run(tmp_path / "c.parquet", tmp_path / "out", tokenizer, on_error="skip")["skipped"] == 1
    assert files(tmp_path / "out") == megatron(tmp_path / "ref", documents, tokenizer)
    whole = (tmp_path / "c.parquet").read_bytes()
    (tmp_path / "c.parquet").write_bytes(whole[:-20])
    with pytest.raises(JobError, match=r"c\.parquet is not a readable parquet file"):
        run(tmp_path / "c.parquet", tmp_path / "o2", tokenizer)
    (tmp_path / "c.parquet").write_bytes(whole[:60] + bytes(200) + whole[260:])
    with pytest.raises(RunError, match=r"c\.parquet: row 1: unreadable from here on"):
        run(tmp_path / "c.parquet", tmp_path / "o3", tokenizer)


def test_bad_plain_text(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "c.txt").write_bytes(b"one\n\ntwo\nand \xff\n\nthree\n")
    with pytest.raises(RunError, match=r"c\.txt:3: not UTF-8 \(byte 8 of the paragraph\)"):
        run(tmp_path / "c.txt", tmp_path / "out", tokenizer, text_unit="paragraph")
    with pytest.raises(RunError, match=r"c\.txt:4: not UTF-8"):
        run(tmp_path / "c.txt", tmp_path / "out2", tokenizer, text_unit="line")


def _wrong(tmp: Path) -> dict[str, tuple[dict, str, str]]:
    """name -> (options, key of the error, words in it)"""
    (tmp / "good.jsonl").write_bytes(jsonl(["a", "b"]))
    (tmp / "empty.jsonl").write_bytes(b"")
    (tmp / "data.xyz").write_text("x")
    (tmp / "folder").mkdir()
    (tmp / "folder" / "image.png").write_text("x")
    (tmp / "bad_tokenizer").mkdir()
    (tmp / "bad_tokenizer" / "tokenizer.json").write_text('{"model": {')
    (tmp / "no_tokenizer").mkdir()
    pq.write_table(pa.table({"content": ["a"], "n": [1]}), tmp / "c.parquet")
    (tmp / "broken_hf").mkdir()
    for name in ("state.json", "dataset_info.json"):
        (tmp / "broken_hf" / name).write_text("{}")
    return {
        "missing file": ({"input": [tmp / "nowhere.jsonl"]}, "input", "nowhere.jsonl does not exist"),
        "empty file": ({"input": [tmp / "empty.jsonl"]}, "input", "no text"),
        "unknown name": ({"input": [tmp / "data.xyz"]}, "format", "data.xyz"),
        "nothing in the folder": ({"input": [tmp / "folder"]}, "input", "no file in"),
        "tokenizer missing": ({"tokenizer": tmp / "nowhere" / "deep" / "tok"}, "tokenizer", "does not exist"),
        "tokenizer damaged": ({"tokenizer": tmp / "bad_tokenizer"}, "tokenizer", "bad_tokenizer"),
        "no tokenizer in it": ({"tokenizer": tmp / "no_tokenizer"}, "tokenizer", "cannot be loaded"),
        "no column": ({"input": [tmp / "c.parquet"]}, "text_key", "no column 'text', only content, n"),
        "no text column": ({"input": [tmp / "c.parquet"], "text_key": "n"}, "text_key", "holds int64, not text"),
        "not a parquet file": ({"input": [tmp / "good.jsonl"], "format": "parquet"}, "input", "not a readable parquet"),
        "no saved dataset": ({"input": [tmp / "broken_hf"]}, "input", "save_to_disk"),
        "output is a folder": ({"output": tmp / "folder"}, "output", "is a folder"),
        "output is a file's name": ({"output": tmp / "out.bin"}, "output", "one file"),
        "output in a file": ({"output": tmp / "good.jsonl" / "out"}, "output", "cannot write"),
        "no such eod": ({"eod_token": "<nope>", "append_eod": True}, "eod_token", "not in the vocabulary"),
    }


WRONG = [
    *("missing file", "empty file", "unknown name", "nothing in the folder", "tokenizer missing", "tokenizer damaged"),
    *("no tokenizer in it", "no column", "no text column", "not a parquet file", "no saved dataset"),
    *("output is a folder", "output is a file's name", "output in a file", "no such eod"),
]


@pytest.mark.parametrize("name", WRONG)
def test_wrong_commands_write_nothing(tmp_path: Path, tokenizer: str, name: str) -> None:
    cases = _wrong(tmp_path)
    assert set(WRONG) == set(cases)
    changes, key, words = cases[name]
    before = names(tmp_path)
    options = {"input": [tmp_path / "good.jsonl"], "output": tmp_path / "out", "tokenizer": tokenizer, **changes}
    with pytest.raises(JobError) as caught:
        prepare(PrepareOptions.model_validate(json.loads(json.dumps(options, default=str))))
    assert caught.value.key == key and words in str(caught.value)
    assert names(tmp_path) == before


@pytest.mark.parametrize("split", ["0.5", "1,0", "-1,2", "1,1,1,1"])
def test_splits_that_are_none(split: str) -> None:
    with pytest.raises(ValueError, match="two or three positive shares"):
        PrepareOptions(input=("x",), tokenizer="x", output="x", split=split)  # type: ignore[arg-type]


def test_nothing_in_it(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "c.txt").write_text("\n \n\n")
    with pytest.raises(RunError, match="no document in the input"):
        run(tmp_path / "c.txt", tmp_path / "out", tokenizer)
    (tmp_path / "d.txt").write_text("one document")
    with pytest.raises(RunError, match=r"split .* got no document"):
        run(tmp_path / "d.txt", tmp_path / "out", tokenizer, split="0.5,0.5")
    assert names(tmp_path) == ["c.txt", "d.txt"]


def test_existing_output(tmp_path: Path, tokenizer: str) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl([name]))
    run(tmp_path / "a.jsonl", tmp_path / "out", tokenizer)
    before = files(tmp_path / "out")
    with pytest.raises(JobError, match="exists and is not of this command"):
        run(tmp_path / "b.jsonl", tmp_path / "out", tokenizer)
    with pytest.raises(JobError, match="exists and is not of this command"):
        run(tmp_path / "a.jsonl", tmp_path / "out", tokenizer, append_eod=True)
    assert files(tmp_path / "out") == before
    run(tmp_path / "b.jsonl", tmp_path / "out", tokenizer, overwrite=True)
    assert files(tmp_path / "out") == megatron(tmp_path / "ref", ["b"], tokenizer)
    (tmp_path / "many.jsonl").write_bytes(jsonl(["c"] * 50))
    run(tmp_path / "many.jsonl", tmp_path / "out", tokenizer, overwrite=True, split="0.5,0.5")
    assert "out.bin" not in names(tmp_path) and "out_train.idx" in names(tmp_path)


def test_input_that_changes_while_it_is_read(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "c.jsonl"
    source.write_bytes(jsonl(texts(20)))
    plain = preparation.run_all

    def change(*args: object) -> None:
        plain(*args)  # type: ignore[arg-type]
        with source.open("ab") as stream:
            stream.write(b'{"text": "late"}\n')

    monkeypatch.setattr(preparation, "run_all", change)
    with pytest.raises(RunError, match="changed while it was read"):
        run(source, tmp_path / "out", tokenizer)
    assert not list(tmp_path.glob("out.*n*")) and not (tmp_path / "out.idx").exists()


@pytest.mark.parametrize("where", ["part", "merge"])
def test_a_full_disk(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    documents = texts(30)
    (tmp_path / "c.jsonl").write_bytes(jsonl(documents))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*args: object) -> None:
        raise full

    patch = pytest.MonkeyPatch()
    patch.setattr(parts if where == "part" else merge, "as_bytes", fail)
    with pytest.raises(RunError, match="the disk is full") as caught:
        run(tmp_path / "c.jsonl", tmp_path / "out", tokenizer)
    assert "free space" in caught.value.remedy
    assert names(tmp_path) == ["c.jsonl", *(["out.work"] if where == "merge" else [])]  # only what is worth keeping
    patch.undo()
    monkeypatch.setattr(pool, "LocalWorker", None if where == "merge" else pool.LocalWorker)
    run(tmp_path / "c.jsonl", tmp_path / "out", tokenizer)  # after a full disk in the merge nothing is encoded again
    assert files(tmp_path / "out") == megatron(tmp_path / "ref", documents, tokenizer)


COMMAND = [sys.executable, "-c", "from swift_dist.cli import main; raise SystemExit(main())", "data", "prepare"]


def test_the_command_line(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "c.jsonl").write_bytes(jsonl([f"document {k}" for k in range(99)]))
    (tmp_path / "bad.jsonl").write_bytes(jsonl(["a"]) + b"{\n")
    words = ["--tokenizer", tokenizer, "--output", str(tmp_path / "out"), "--workers", "2"]

    def call(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run([*COMMAND, *more, *words], capture_output=True, text=True)

    done = call(str(tmp_path / "c.jsonl"), "--split", "0.9,0.1", "--append_eod", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["documents"] == 99
    again = call(str(tmp_path / "c.jsonl"), "--split", "0.9,0.1", "--append_eod")
    assert again.returncode == 0 and "nothing to do" in again.stdout
    missing = call(str(tmp_path / "none.jsonl"), "--overwrite", "true")
    assert missing.returncode == 2 and "none.jsonl does not exist" in missing.stderr and "Trace" not in missing.stderr
    bad = call(str(tmp_path / "bad.jsonl"), "--overwrite", "true")
    assert bad.returncode == 1 and "bad.jsonl:2: not JSON" in bad.stderr and "Trace" not in bad.stderr
    assert "--on_error skip" in bad.stderr


def test_one_at_a_time(tmp_path: Path, tokenizer: str) -> None:
    from swift_dist.data.work_folder import WorkFolder

    (tmp_path / "c.jsonl").write_bytes(jsonl(["a"]))
    with WorkFolder(tmp_path / "out"), pytest.raises(JobError, match="another `data prepare` is writing"):
        run(tmp_path / "c.jsonl", tmp_path / "out", tokenizer)
    assert names(tmp_path) == ["c.jsonl"]
    run(tmp_path / "c.jsonl", tmp_path / "out", tokenizer)


def test_a_worker_that_dies_is_reported(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    (tmp_path / "c.jsonl").write_bytes(jsonl(texts(300)))
    started: list[LocalWorker] = []

    class Doomed(LocalWorker):
        def submit(self, unit: object) -> None:
            if not started:
                started.append(self)
                os.kill(self._process.pid, signal.SIGKILL)
                time.sleep(0.2)
            super().submit(unit)

    monkeypatch.setattr(pool, "LocalWorker", Doomed)
    monkeypatch.setattr(preparation, "unit_size", lambda found: 2000)
    with pytest.raises(RunError, match="a worker process was killed by signal 9") as caught:
        run(tmp_path / "c.jsonl", tmp_path / "out", tokenizer, workers=2)
    assert "goes on" in caught.value.remedy
    result = run(tmp_path / "c.jsonl", tmp_path / "out", tokenizer)
    assert result["documents"] == 300
