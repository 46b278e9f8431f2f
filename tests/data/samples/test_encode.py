"""Rows to stores: what becomes of every row, whoever does the work, whoever else wants it, and whatever ends it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from datetime import date
from pathlib import Path
from typing import Any, ClassVar

import pytest

import swift_dist.data.templates.template as template_module
from swift_dist.config.job import JobConfig
from swift_dist.data.rows import _records
from swift_dist.data.samples import encode as encode_module
from swift_dist.data.samples import identity
from swift_dist.data.samples.encode import encode_samples
from swift_dist.data.samples.store import SampleStore
from swift_dist.data.samples.store_lock import StoreLock
from swift_dist.data.samples.unit_encoder import Recipe, UnitFacts, UnitId
from swift_dist.errors import JobError, RunError
from swift_dist.workers import pool
from tests.data.samples.cases import ByteTemplate, conversation, job, make_tokenizer, text_of, write_rows

ROOT = Path(__file__).parents[3]


class Inline:
    """A worker without a process of its own."""

    units: ClassVar[list[UnitId]] = []  # of all instances

    def __init__(self, recipe: Recipe) -> None:
        self._encode, self._waiting = recipe.start(), deque[UnitId]()

    def submit(self, unit: UnitId) -> None:
        self._waiting.append(unit)

    def result(self) -> UnitFacts:
        Inline.units.append(self._waiting[0])
        return self._encode(self._waiting.popleft())

    def close(self) -> None: ...


def work_inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is done in this process, by bytes, in units of a few rows."""
    Inline.units.clear()
    monkeypatch.setattr(pool, "LocalWorker", Inline)
    monkeypatch.setattr(template_module, "load_template", lambda *_: ByteTemplate())
    monkeypatch.setattr(_records, "UNIT_BYTES", 300)
    monkeypatch.setattr(identity, "_code_hash", lambda: "code")  # whose files somebody may be editing


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    work_inline(monkeypatch)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """What the name of a store depends on; `ByteTemplate` reads nothing of it."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    return folder


def make_job(tokenizer: Path, rows: Path, *, length: int = 64, truncation: str = "delete", **data: Any) -> JobConfig:
    return job(
        model={"path": str(tokenizer)},
        data={"train": [str(rows)], "sequence_length": length, "workers": 2, **data},
        template={"truncation": truncation},
    )


def encode(config: JobConfig, kind: Any, cache: Path) -> SampleStore:
    (store,) = encode_samples(config, kind, cache, progress=False)
    return store


def texts(store: SampleStore) -> list[list[str]]:
    return [[text_of(sequence) for sequence in store.sequences(k)] for k in range(store.num_samples)]


def kto_row(question: str, answer: str, label: bool) -> dict[str, Any]:
    return {"prompt": question, "completion": answer, "label": label}


ROWS = [conversation(f"q{k}", f"a{k}") for k in range(40)]


@pytest.mark.usefixtures("inline")
def test_rows_become_samples_in_file_order(tmp_path: Path, tokenizer: Path) -> None:
    store = encode(make_job(tokenizer, write_rows(tmp_path / "r.jsonl", ROWS)), "single", tmp_path / "cache")
    assert len(Inline.units) > 5  # units, so that their order is at stake
    assert texts(store) == [[f"q{k}|A{k}"] for k in range(40)]
    assert store.facts["rows"] == 40 and store.facts["bad"] == {}
    summary = "40 rows, 40 samples, 260 tokens; length 7 median, 7 p95, 7 max; 42.3% of the tokens learn"
    assert summary in store.summary()
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == sorted(
        [store.path.name, f".{store.path.name}.lock"]
    )


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(tmp_path: Path, tokenizer: Path, workers: int) -> None:
    rows = write_rows(tmp_path / "r.jsonl", [kto_row(f"q{k}", f"a{k}", k % 2 == 0) for k in range(40)])
    one, other = (
        encode(make_job(tokenizer, rows, workers=count), "kto", tmp_path / f"cache{count}") for count in (2, workers)
    )
    assert one.fingerprint() == other.fingerprint() and one.path.name == other.path.name


@pytest.mark.usefixtures("inline")
def test_bad_rows_are_left_out_counted_and_listed(tmp_path: Path, tokenizer: Path, caplog: Any) -> None:
    rows: list = list(ROWS[:6])
    rows[1] = "{not json"
    rows[3] = conversation("bad", "x")
    rows[4] = conversation("q", "long" * 20)
    path = write_rows(tmp_path / "r.jsonl", rows)
    store = encode(make_job(tokenizer, path), "single", tmp_path / "cache")
    assert texts(store) == [["q0|A0"], ["q2|A2"], ["q5|A5"]]
    assert store.facts["bad"] == {"unusable": 2, "too long": 1} and store.facts["rows"] == 6
    listed = {row["row"]: (row["reason"], row["kind"]) for row in store.bad_rows()}
    assert list(listed) == [f"{path}:{line}" for line in (2, 4, 5)]
    assert listed[f"{path}:4"] == ("the template refuses it", "unusable")
    assert listed[f"{path}:5"] == ("too long (82 tokens)", "left out")
    assert listed[f"{path}:2"][0].startswith("not JSON")
    assert f"{path}:4: the template refuses it" in caplog.text and "too long" not in caplog.text
    assert "6 rows (3 left out: 2 unusable, 1 too long), 3 samples" in store.summary()


@pytest.mark.usefixtures("inline")
def test_bad_rows_stop_the_job_where_it_says_so(tmp_path: Path, tokenizer: Path) -> None:
    sound = write_rows(tmp_path / "sound.jsonl", [*ROWS[:3], conversation("q", "long" * 20)])
    encode(make_job(tokenizer, sound, bad_rows="stop"), "single", tmp_path / "cache")  # too long is no damage
    path = write_rows(tmp_path / "r.jsonl", [ROWS[0], conversation("q", "bad"), "[]"])
    for _ in range(2):  # encoded, and found encoded
        with pytest.raises(JobError, match=r"data\.train: 2 rows of .* cannot be used") as caught:
            encode(make_job(tokenizer, path, bad_rows="stop"), "single", tmp_path / "cache")
        assert f"{path}:2: the template refuses it" in str(caught.value) and f"{path}:3: " in str(caught.value)
    assert encode(make_job(tokenizer, path), "single", tmp_path / "cache").num_samples == 1


@pytest.mark.usefixtures("inline")
def test_rows_that_all_are_bad_are_an_error(tmp_path: Path, tokenizer: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", [conversation("bad", "x"), conversation("q", "long" * 20)])
    with pytest.raises(JobError, match=r"gives no sample: 2 rows(.|\n)*:1: the template refuses it\n.*:2: too long"):
        encode(make_job(tokenizer, path), "single", tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("truncation", ["left", "right", "split"])
def test_truncation_is_the_templates(tmp_path: Path, tokenizer: Path, truncation: str) -> None:
    path = write_rows(tmp_path / "r.jsonl", [conversation("qq", "answers")])
    store = encode(make_job(tokenizer, path, length=6, truncation=truncation), "single", tmp_path / "cache")
    wanted = {"left": [["nSWERS"]], "right": [["qq|ANS"]], "split": [["qq|ANS"], ["sWERS"]]}
    assert texts(store) == wanted[truncation]
    assert len(set(store.hashes.tolist())) == 1  # the pieces of a row are on one side of a split


@pytest.mark.usefixtures("inline")
def test_pairs(tmp_path: Path, tokenizer: Path) -> None:
    rows = [{"prompt": f"q{k}", "chosen": f"yes{k}", "rejected": f"no{k}"} for k in range(3)]
    store = encode(make_job(tokenizer, write_rows(tmp_path / "r.jsonl", rows)), "pair", tmp_path / "cache")
    assert texts(store) == [[f"q{k}|YES{k}", f"q{k}|NO{k}"] for k in range(3)]
    assert "chosen answers" not in store.summary()
    write_rows(tmp_path / "m.jsonl", [*rows, ROWS[0]])
    store = encode(make_job(tokenizer, tmp_path / "m.jsonl"), "single", tmp_path / "cache")
    assert texts(store)[:3] == [[f"q{k}|YES{k}"] for k in range(3)]
    assert "3 rows are pairs, of which the chosen answers are learnt" in store.summary()
    with pytest.raises(JobError, match=r"template\.truncation.*split"):
        encode(make_job(tokenizer, tmp_path / "r.jsonl", truncation="split"), "pair", tmp_path / "cache")
    with pytest.raises(JobError, match=r"data\.packing.*pair"):
        encode(make_job(tokenizer, tmp_path / "r.jsonl", packing=True), "pair", tmp_path / "cache")


@pytest.mark.usefixtures("inline")
def test_a_mismatched_answer_is_the_next_good_rows(tmp_path: Path, tokenizer: Path) -> None:
    """Across units, over bad rows, and from the last row to the first."""
    rows = [kto_row(f"q{k}", f"a{k}", k % 3 == 0) for k in range(20)]
    rows[0] = kto_row("bad", "x", True)
    rows[5] = kto_row("q5", "long" * 20, True)
    rows[19] = kto_row("q19", "bad", True)
    path = write_rows(tmp_path / "r.jsonl", rows)
    store = encode(make_job(tokenizer, path), "kto", tmp_path / "cache")
    assert len(Inline.units) >= 4
    good = [k for k in range(20) if k not in (0, 5, 19)]
    nexts = [*good[1:], good[0]]
    assert texts(store) == [[f"q{k}|A{k}", f"q{k}|A{after}"] for k, after in zip(good, nexts, strict=True)]
    assert [store.label(n) for n in range(store.num_samples)] == [int(k % 3 == 0) for k in good]
    assert store.facts["rows"] == 20 and store.facts["bad"] == {"unusable": 2, "too long": 1}
    write_rows(path, [rows[0], rows[1]])
    with pytest.raises(JobError, match="no other row has an answer"):
        encode(make_job(tokenizer, path), "kto", tmp_path / "cache")


@pytest.mark.usefixtures("inline")
def test_only_wanted_answers_are_imitated(tmp_path: Path, tokenizer: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", [kto_row(f"q{k}", f"a{k}", k % 2 == 0) for k in range(4)])
    store = encode(make_job(tokenizer, path), "single", tmp_path / "cache")
    assert texts(store) == [["q0|A0"], ["q2|A2"]] and store.facts["bad"] == {"unusable": 2}
    assert "its answer is not wanted" in store.bad_rows()[0]["reason"]
    path = write_rows(tmp_path / "c.jsonl", [{"text": "good", "label": 1}])
    with pytest.raises(JobError, match="a label to classify it by"):
        encode(make_job(tokenizer, path), "single", tmp_path / "cache")


@pytest.mark.usefixtures("inline")
def test_classified_texts_and_words(tmp_path: Path, tokenizer: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", [{"text": "good", "label": 1}, {"text": "poor", "label": 0}])
    store = encode(make_job(tokenizer, path), "classification", tmp_path / "cache")
    assert texts(store) == [["good"], ["poor"]] and [store.label(k) for k in (0, 1)] == [1, 0]
    path = write_rows(tmp_path / "w.jsonl", [{"tokens": ["in", "new", "york"], "ner_tags": [0, -100, 2]}])
    store = encode(make_job(tokenizer, path), "token_classification", tmp_path / "cache")
    assert texts(store) == [["In new York"]] and store.label(0) == [0, 2]
    path = write_rows(tmp_path / "n.jsonl", [ROWS[0]])
    with pytest.raises(JobError, match="it has no label"):
        encode(make_job(tokenizer, path), "classification", tmp_path / "cache")


@pytest.mark.usefixtures("inline")
def test_a_store_is_found_by_content(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, path = tmp_path / "cache", write_rows(tmp_path / "r.jsonl", ROWS[:8])

    def made(config: JobConfig, kind: Any = "single") -> bool:
        Inline.units.clear()
        encode(config, kind, cache)
        return bool(Inline.units)

    assert made(make_job(tokenizer, path)) and not made(make_job(tokenizer, path))
    copies = tmp_path / "copies"
    shutil.copytree(tokenizer, copies / "tokenizer")
    shutil.copy(path, copies / "other_name.jsonl")
    assert not made(make_job(copies / "tokenizer", copies / "other_name.jsonl", workers=1))  # content, not paths
    assert made(make_job(tokenizer, path, length=63))
    assert made(make_job(tokenizer, path, truncation="right"))
    (tokenizer / "chat_template.jinja").write_text("x")
    assert made(make_job(tokenizer, path))
    monkeypatch.setattr(identity, "_code_hash", lambda: "other code")
    assert made(make_job(tokenizer, path))
    path.write_text(path.read_text().replace("a3", "b3"))
    assert made(make_job(tokenizer, path))
    rows = write_rows(tmp_path / "t.jsonl", [{"text": "x", "label": 1}])
    assert made(make_job(tokenizer, rows), "classification")


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("damage", ["changed", "cut off"])
def test_a_damaged_store_is_made_again(tmp_path: Path, tokenizer: Path, caplog: Any, damage: str) -> None:
    config = make_job(tokenizer, write_rows(tmp_path / "r.jsonl", ROWS))
    store = encode(config, "single", tmp_path / "cache")
    before, file = texts(store), store.path / "tokens.bin"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:-4] if damage == "cut off" else b"\xff" + data[1:])
    assert texts(encode(config, "single", tmp_path / "cache")) == before
    assert f"{file} is" in caplog.text and "encoded again" in caplog.text


@pytest.mark.usefixtures("inline")
def test_several_sources_share_the_workers(tmp_path: Path, tokenizer: Path) -> None:
    paths = [write_rows(tmp_path / f"{name}.jsonl", ROWS[k : k + 10]) for k, name in enumerate("ab")]
    entries = [{"path": str(paths[0]), "weight": 2}, {"path": str(paths[1]), "weight": 1}]
    entries.append({"path": str(paths[0]), "weight": 3})  # the same content: one store
    stores = encode_samples(
        make_job(tokenizer, paths[0], train=entries, validation=[str(paths[1])]), "single", tmp_path / "cache", False
    )
    assert [store.weight for store in stores] == [2, 1, 3] and stores[0].path == stores[2].path != stores[1].path
    assert {unit.source for unit in Inline.units} == {0, 1}
    Inline.units.clear()
    config = make_job(tokenizer, paths[0], validation=[str(paths[1])])
    (validation,) = encode_samples(config, "single", tmp_path / "cache", False, key="data.validation")
    assert validation.path == stores[1].path and not Inline.units
    with pytest.raises(JobError, match=r"data\.validation: no dataset given"):
        encode_samples(make_job(tokenizer, paths[0]), "single", tmp_path / "cache", False, key="data.validation")


@pytest.mark.usefixtures("inline")
def test_another_run_waits_for_the_one_that_encodes(tmp_path: Path, tokenizer: Path) -> None:
    cache, config = tmp_path / "cache", make_job(tokenizer, write_rows(tmp_path / "r.jsonl", ROWS))
    name = encode(config, "single", tmp_path / "elsewhere").path.name
    Inline.units.clear()
    found: list[SampleStore] = []
    with StoreLock(cache, name) as lock:
        other = threading.Thread(target=lambda: found.append(encode(config, "single", cache)))
        other.start()
        time.sleep(0.5)
        assert not found and not Inline.units
        shutil.copytree(tmp_path / "elsewhere" / name, lock.target)
    other.join(timeout=150)
    assert len(found) == 1 and not Inline.units


KILLED = """
import os, signal, sys
from pathlib import Path
import pytest
from swift_dist.data.samples import encode as module
from tests.data.samples.test_encode import Inline, make_job, work_inline
monkeypatch = pytest.MonkeyPatch()
work_inline(monkeypatch)
rows, tokenizer, cache, when = map(Path, sys.argv[1:])
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
if when.name == "units":
    result = Inline.result
    monkeypatch.setattr(Inline, "result", lambda self: die() if len(Inline.units) == 4 else result(self))
else:
    monkeypatch.setattr(module, "SampleStore", die)
module.encode_samples(make_job(tokenizer, rows, workers=1), "single", cache, False)
"""


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("when", ["units", "merge"])
def test_a_killed_encode_leaves_no_half_store_and_is_gone_on_with(tmp_path: Path, tokenizer: Path, when: str) -> None:
    cache, rows = tmp_path / "cache", write_rows(tmp_path / "r.jsonl", ROWS)
    words = [sys.executable, "-c", KILLED, str(rows), str(tokenizer), str(cache), when]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert all(path.name.startswith(".") for path in cache.iterdir())
    parts = len(list(cache.glob(".*.work/parts/*.npz")))
    whole = encode(make_job(tokenizer, rows), "single", tmp_path / "elsewhere")
    units = len(Inline.units)
    assert parts == (4 if when == "units" else units)
    if when == "units":  # one of the parts is damaged as well
        next(iter(cache.glob(".*.work/parts/*.npz"))).write_bytes(b"x")
        parts -= 1
    Inline.units.clear()
    store = encode(make_job(tokenizer, rows), "single", cache)
    assert store.fingerprint() == whole.fingerprint() and len(Inline.units) == units - parts
    assert not (cache / f".{store.path.name}.work").exists()


@pytest.mark.usefixtures("inline")
def test_what_cannot_be_written(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_job(tokenizer, write_rows(tmp_path / "r.jsonl", ROWS[:3]))
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match=r"data\.cache: cannot write"):
        encode(config, "single", tmp_path / "file")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encode_module, "merge", full)
    with pytest.raises(RunError, match="No space left"):
        encode(config, "single", tmp_path / "cache")


def test_the_code_that_makes_samples_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read.append(self) or real(self))
    assert identity._code_hash.__wrapped__() == identity._code_hash.__wrapped__()
    names = {file.relative_to(ROOT / "swift_dist" / "data").as_posix() for file in read}
    assert {"rows/messages.py", "templates/template.py", "templates/agents/react.py", "readers.py"} <= names
    assert {"samples/unit_encoder.py", "samples/truncation.py"} <= names


def test_jobs_without_tokenizer_or_data(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"model\.tokenizer"):
        encode_samples(job(data={"train": ["x"]}), "single", tmp_path)
    with pytest.raises(JobError, match=r"data\.train: no dataset given"):
        encode_samples(job(model={"path": "x"}), "single", tmp_path)


def test_real_processes_and_a_real_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two worker processes give the same files as none; the tokens are those of the chat template."""
    monkeypatch.setattr(_records, "UNIT_BYTES", 1000)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    path = write_rows(tmp_path / "r.jsonl", ROWS)
    store = encode(make_job(tokenizer, path, length=128), "single", tmp_path / "two")
    monkeypatch.setattr(pool, "LocalWorker", Inline)
    alone = encode(make_job(tokenizer, path, length=128, workers=1), "single", tmp_path / "none")
    for name in json.loads((store.path / "store.json").read_text())["files"]:
        assert (store.path / name).read_bytes() == (alone.path / name).read_bytes()
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    (encoded,) = store.sequences(7)
    assert encoded.ids.tolist() == loaded.apply_chat_template(ROWS[7]["messages"], return_dict=False)
    learnt = encoded.ids[encoded.weights > 0].tolist()
    assert loaded.decode(learnt) == "a7<|im_end|>" and store.num_samples == 40
    kinds: dict[Any, tuple[list, list]] = {
        "pair": ([{"prompt": "q", "chosen": "yes", "rejected": "no"}], ["yes<|im_end|>", "no<|im_end|>"]),
        "kto": ([kto_row("q", "a0", True), kto_row("q", "a1", False)], ["a0<|im_end|>", "a1<|im_end|>"]),
        "classification": ([{"text": "fine", "label": [1]}], [""]),
        "token_classification": ([{"tokens": ["in", "new", "york"], "ner_tags": [0, -100, 2]}], ["iy"]),
    }
    for kind, (rows, learns) in kinds.items():
        config = make_job(tokenizer, write_rows(tmp_path / f"{kind}.jsonl", rows), length=128)
        found = encode(config, kind, tmp_path / "none").sequences(0)
        assert [loaded.decode(s.ids[s.weights > 0]) for s in found] == learns, kind
        assert (loaded.decode(found[0].ids) == "fine<|im_end|>") == (kind == "classification")


@pytest.mark.usefixtures("inline")
def test_bad_rows_of_a_store_that_was_found_are_named_where_they_are_now(
    tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*ROWS[:4], conversation("q", "bad")]
    first, second = (write_rows(tmp_path / name, rows) for name in ("first.jsonl", "second.jsonl"))
    encode(make_job(tokenizer, first), "single", tmp_path / "cache")
    first.unlink()
    Inline.units.clear()
    caplog.clear()
    encode(make_job(tokenizer, second), "single", tmp_path / "cache")
    assert not Inline.units and f"{second}:5: the template refuses it" in caplog.text and str(first) not in caplog.text
    with pytest.raises(JobError, match=rf"{second}:5: the template refuses it"):
        encode(make_job(tokenizer, second, bad_rows="stop"), "single", tmp_path / "cache")


@pytest.mark.usefixtures("inline")
def test_a_date_that_the_chat_template_writes_is_in_the_name_of_the_store(tmp_path: Path, tokenizer: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", ROWS[:3])

    def store(day: str | None) -> Path:
        config = make_job(tokenizer, path)
        template = config.template.model_copy(update={"date": day})
        return encode(config.model_copy(update={"template": template}), "single", tmp_path / "cache").path

    assert store("2026-01-01") == store("2026-01-02") == store(None)
    (tokenizer / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}")
    assert store("2026-01-01") != store("2026-01-02") and store(date.today().isoformat()) == store(None)
