"""Rows that are trained on while they are encoded: exactly once, whoever asks; and nobody waits for ever."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from swift_dist.config.job import JobConfig
from swift_dist.data.samples import chunk_encoder, stream_status, streaming
from swift_dist.data.samples.chunk_encoder import ChunkFacts, ChunkTask
from swift_dist.data.samples.loader import SampleData
from swift_dist.data.samples.opening import open_samples, stream_as_values
from swift_dist.data.samples.store_lock import FileLock
from swift_dist.data.samples.stream import StreamPlan
from swift_dist.data.samples.streaming import Encoding, open_stream, require_streamable
from swift_dist.data.samples.unit_encoder import UnitId
from swift_dist.errors import JobError, RunError
from swift_dist.workers import pool
from tests.data.samples.cases import conversation, job, make_tokenizer, write_rows
from tests.data.samples.test_encode import kto_row, work_inline

ROWS = [conversation(f"q{k}", f"a{k}") for k in range(100)]


Process = pool.LocalWorker


class Worker:
    """A worker without a process of its own, which does a chunk only when it may."""

    may: ClassVar[threading.Semaphore]
    done: ClassVar[list[UnitId]]

    def __init__(self, task: ChunkTask) -> None:
        self._do, self._waiting, self._closed = task.start(), deque[UnitId](), False

    def submit(self, unit: UnitId) -> None:
        self._waiting.append(unit)

    def result(self) -> ChunkFacts:
        while not Worker.may.acquire(timeout=0.05):
            if self._closed:
                raise RunError("closed")
        facts = self._do(self._waiting.popleft())
        Worker.done.append(facts.id)
        return facts

    def close(self) -> None:
        self._closed = True


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is done in this process, in chunks of a few rows, by bytes."""
    work_inline(monkeypatch)
    Worker.may, Worker.done = threading.Semaphore(10**9), []
    monkeypatch.setattr(pool, "LocalWorker", Worker)
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 300)
    monkeypatch.setattr(stream_status, "_WRITE_SECONDS", 0.1)
    monkeypatch.setattr(stream_status, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(stream_status, "_LATE_SECONDS", 0.5)


def make_job(tokenizer: Path, *rows: Any, train: dict | None = None, **data: Any) -> JobConfig:
    base = {"sequence_length": 64, "workers": 1, "streaming": True, "prefetch": 1}
    return job(
        model={"path": str(tokenizer)},
        data={
            "train": [str(path) if isinstance(path, Path) else path for path in rows],
            **base,
            **data,
        },
        train={"steps": 1000, "global_batch_size": 8, **(train or {})},
    )


def plan_of(config: JobConfig, cache: Path, kind: Any = "single", run: str = "run") -> tuple[StreamPlan, Encoding]:
    return open_stream(config, kind, cache, run, vocab_size=300)


@contextmanager
def opened(config: JobConfig, plan: StreamPlan, rank: int = 0, size: int = 1, **more: Any) -> Iterator[SampleData]:
    values = stream_as_values(plan, [])
    data = open_samples(values, config, dp_rank=rank, dp_size=size, layout="packed", pad_id=0, **more)
    try:
        yield data
    finally:
        data.close()


def texts(batches: list[dict[str, Any]]) -> list[str]:
    """The samples of some micro-batches, each as its text."""
    found = []
    for batch in batches:
        ids, begin = batch["tokens"][0].tolist(), 0
        for length, weight in zip(batch["lengths"].tolist(), batch["sample_weights"].tolist(), strict=True):
            found += [bytes(ids[begin : begin + length]).decode()] * int(weight)
            begin += length
    return found


def steps(config: JobConfig, plan: StreamPlan, which: range, rank: int = 0, size: int = 1) -> list[list[str]]:
    with opened(config, plan, rank, size) as data:
        return [texts(data.micro_batches(step)) for step in which]


def together(parts: list[list[str]]) -> list[str]:
    return [text for part in parts for text in part]


def everything(config: JobConfig, plan: StreamPlan, encoding: Encoding, which: range) -> list[list[str]]:
    with encoding:
        return steps(config, plan, which)


ALL = {f"q{k}|a{k}" for k in range(100)}


@pytest.mark.parametrize("how", [{}, {"group_by_length": True}])
def test_every_row_once_a_pass_on_any_number_of_ranks(tmp_path: Path, tokenizer: Path, how: dict) -> None:
    config = make_job(tokenizer, write_rows(tmp_path / "r.jsonl", ROWS), **how)
    plan, encoding = plan_of(config, tmp_path / "cache")
    assert len(Worker.done) == 1 and plan.counts[0] > 20  # training begins with the first chunk
    with encoding:
        alone = steps(config, plan, range(25))
        flat = together(alone)
        if not how:
            assert set(flat[:100]) == set(flat[100:]) == ALL and flat[:100] != flat[100:]
        for size, micro in ((2, 2), (4, 1)):
            other = make_job(tokenizer, tmp_path / "r.jsonl", train={"micro_batch_size": micro}, **how)
            ranks = [steps(other, plan, range(3, 9), rank, size) for rank in range(size)]  # a resume at step 3
            for step, parts in enumerate(zip(*ranks, strict=True), start=3):
                assert sorted(text for part in parts for text in part) == sorted(alone[step])
    assert not list((tmp_path / "cache").glob(".encoding*"))


def test_packs_hold_every_row_once(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swift_dist.data.samples.stream_order._SPAN", 25)
    config = make_job(tokenizer, write_rows(tmp_path / "r.jsonl", ROWS), packing=True, sequence_length=20)
    plan, encoding = plan_of(config, tmp_path / "cache")
    with encoding:
        seen = steps(config, plan, range(4))
        assert steps(config, plan, range(2, 4)) == seen[2:]
        with opened(config, plan) as data:
            lengths = [batch["lengths"].tolist() for step in range(4) for batch in data.micro_batches(step)]
    assert all(len(pack) > 1 and sum(pack) <= 20 for pack in lengths[:10])
    flat = together(seen)
    assert len(flat) > 64 and max(Counter(flat[:64]).values()) == 1


def test_the_seed_decides_the_order(tmp_path: Path, tokenizer: Path) -> None:
    orders = []
    for seed in (1, 2):
        config = make_job(tokenizer, write_rows(tmp_path / "r.jsonl", ROWS), train={"seed": seed})
        orders.append(everything(config, *plan_of(config, tmp_path / "cache"), range(12)))
    assert orders[0] != orders[1]
    assert Counter(Worker.done).most_common(1)[0][1] <= 4  # looked at, not made again
    assert len(list((tmp_path / "cache").glob("*/0*"))) == len(set(Worker.done))


def test_datasets_with_weights_and_without(tmp_path: Path, tokenizer: Path) -> None:
    first, second = (write_rows(tmp_path / f"{k}.jsonl", ROWS[at : at + 50]) for k, at in enumerate((0, 50)))
    config = make_job(tokenizer, first, second)
    flat = together(everything(config, *plan_of(config, tmp_path / "cache"), range(12)))
    assert len(set(flat)) == 96
    entries = [{"path": str(first), "weight": 1}, {"path": str(second), "weight": 3}]
    config = make_job(tokenizer, *entries)
    plan, encoding = plan_of(config, tmp_path / "cache", run="other")
    flat = together(everything(config, plan, encoding, range(12)))
    assert abs(sum(int(text.split("|")[0][1:]) < 50 for text in flat) - 24) <= 1
    again, _ = plan_of(config, tmp_path / "cache")
    assert again.fingerprint() == plan.fingerprint()
    other = make_job(tokenizer, entries[0], {**entries[1], "weight": 2})
    assert plan_of(other, tmp_path / "cache")[0].fingerprint() != plan.fingerprint()


@pytest.mark.parametrize("kind", ["pair", "kto", "classification"])
def test_other_kinds_of_samples(tmp_path: Path, tokenizer: Path, kind: str) -> None:
    rows: dict[str, list[dict[str, Any]]] = {
        "pair": [{"prompt": f"q{k}", "chosen": f"yes{k}", "rejected": f"no{k}"} for k in range(40)],
        "kto": [kto_row(f"q{k}", f"a{k}", k % 3 == 0) for k in range(40)],
        "classification": [{"text": f"t{k}", "label": k % 2} for k in range(40)],
    }
    config = make_job(tokenizer, write_rows(tmp_path / "r.jsonl", rows[kind]))
    plan, encoding = plan_of(config, tmp_path / "cache", kind)
    with encoding, opened(config, plan) as data:
        batches = [batch for step in range(5) for batch in data.micro_batches(step)]
    first = {"pair": "q", "kto": "q", "classification": "t"}[kind]
    seen = [bytes(batch["tokens"][0, : batch["lengths"][0]].tolist()).decode().split("|")[0] for batch in batches]
    assert sorted(seen) == sorted(f"{first}{k}" for k in range(40))
    if kind == "classification":
        labels = [batch["sequence_labels"].tolist() for batch in batches]
        assert labels == [[int(text[1:]) % 2] for text in seen]


def test_a_rank_waits_for_its_chunk_and_says_so(
    tmp_path: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("swift_dist.data.prefetch._WAIT_SECONDS", 0.05)
    monkeypatch.setattr("swift_dist.data.samples.stream._TELL_AFTER_SECONDS", 0.2)
    caplog.set_level(logging.INFO)
    config = make_job(tokenizer, write_rows(tmp_path / "r.jsonl", ROWS), train={"global_batch_size": 2})
    plan, encoding = plan_of(config, tmp_path / "cache")
    Worker.may = threading.Semaphore(1)  # the chunk that is there is looked at; no other is made
    told: list[int] = []

    def waiting(what: int) -> None:
        told.append(what)
        if told.count(1) == 11:
            Worker.may.release(10**6)

    with encoding, opened(config, plan, waiting=waiting) as data:
        seen = [text for step in range(40) for text in texts(data.micro_batches(step))]
    assert len(set(seen)) == 80 and told.count(1) >= 11
    assert re.search(
        rf"of {plan.counts[0]} of {re.escape(str(tmp_path / 'r.jsonl'))} to be encoded, for \d+ s so far", caplog.text
    )


def ends(config: JobConfig, plan: StreamPlan, within: float = 150.0) -> Exception:
    """What a rank is told that wants all rows."""
    began = time.monotonic()
    with opened(config, plan) as data, pytest.raises((JobError, RunError)) as caught:
        for step in range(13):
            data.micro_batches(step)
    assert time.monotonic() - began < within
    return caught.value


def test_a_failure_ends_the_run(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_job(tokenizer, write_rows(tmp_path / "r.jsonl", ROWS))
    plan, encoding = plan_of(config, tmp_path / "cache")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(chunk_encoder, "merge", full)
    with encoding:
        error = ends(config, plan)
    assert isinstance(error, RunError) and "No space left" in str(error)
    monkeypatch.undo()


def test_a_bad_row_stops_the_run_where_the_job_says_so(tmp_path: Path, tokenizer: Path) -> None:
    rows: list = [*ROWS]
    path = write_rows(tmp_path / "r.jsonl", rows)
    config = make_job(tokenizer, path, bad_rows="stop")
    plan, _ = plan_of(config, tmp_path / "first")
    streams = plan.streams(config.train.seed, lambda chunk: 0)
    late = int(streams[0].order(0)[-1])  # of the last chunk that is needed
    source, unit = plan.place(late)
    assert source == 0
    lines = path.read_text().splitlines()
    line = min(len(lines) - 1, unit * len(lines) // plan.counts[0] + 1)
    rows[line] = conversation(f"q{line}", "bad")
    write_rows(path, rows)
    plan, encoding = plan_of(config, tmp_path / "cache")
    with encoding:
        error = ends(config, plan)
    assert isinstance(error, JobError) and error.key == "data.train"
    assert f"{path}:{line + 1}: the template refuses it" in str(error) and "1 rows of" in str(error)
    # another run, to which such rows do not matter, made the chunk: it stops this one all the same
    lenient = make_job(tokenizer, path)
    flat = together(everything(lenient, *plan_of(lenient, tmp_path / "cache", run="lenient"), range(25)))
    assert len(set(flat)) == 99
    plan, _ = plan_of(config, tmp_path / "cache")
    assert "cannot be used" in str(ends(config, plan))


def test_bad_rows_are_reported_as_they_come(
    tmp_path: Path,
    tokenizer: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    rows = [conversation("q", "bad") if k % 10 == 3 else row for k, row in enumerate(ROWS)]
    path = write_rows(tmp_path / "r.jsonl", [*rows, conversation("q", "long" * 20)])
    config = make_job(tokenizer, path)
    everything(config, *plan_of(config, tmp_path / "cache"), range(20))
    assert all(f"{path}:{line}: the template refuses it" in caplog.text for line in range(4, 101, 10))
    assert "101 rows (11 left out: 10 unusable, 1 too long), 90 samples" in caplog.text
    assert "chosen answers" not in caplog.text
    pairs = [{"prompt": f"q{k}", "chosen": f"a{k}", "rejected": f"b{k}"} for k in range(30)]
    config = make_job(tokenizer, write_rows(tmp_path / "p.jsonl", pairs))
    everything(config, *plan_of(config, tmp_path / "cache"), range(20))
    assert "30 rows are pairs, of which the chosen answers are learnt" in caplog.text


def test_rows_of_which_none_can_be_used_are_refused_before_anything_starts(tmp_path: Path, tokenizer: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", [conversation("q", f"bad{k}") for k in range(30)])
    with pytest.raises(JobError, match=r"data\.train: .*gives no sample\n.*the template refuses it"):
        plan_of(make_job(tokenizer, path), tmp_path / "cache")
    late = write_rows(tmp_path / "late.jsonl", [*[conversation("q", f"bad{k}") for k in range(30)], *ROWS[:3]])
    config = make_job(tokenizer, late)
    flat = everything(config, *plan_of(config, tmp_path / "cache"), range(3))
    assert Counter(together(flat)) == {"q0|a0": 8, "q1|a1": 8, "q2|a2": 8}


def test_a_driver_that_is_gone_is_noticed(
    tmp_path: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_status, "SILENT_SECONDS", 1.0)
    config = make_job(tokenizer, write_rows(tmp_path / "r.jsonl", ROWS))
    plan, _ = plan_of(config, tmp_path / "cache")
    assert "nobody has encoded rows for 1 s" in str(ends(config, plan))


def test_chunks_that_are_removed_are_missed(tmp_path: Path, tokenizer: Path) -> None:
    config = make_job(tokenizer, write_rows(tmp_path / "r.jsonl", ROWS))
    plan, encoding = plan_of(config, tmp_path / "cache")
    with encoding:
        encoding._thread.join()
        plan.path(int(plan.streams(1234, lambda chunk: 0)[0].order(0)[-1])).rename(tmp_path / "gone")
        assert "was data.cache emptied?" in str(ends(config, plan))


def test_a_chunk_that_is_seen_later_than_the_end_is_waited_for(tmp_path: Path, tokenizer: Path) -> None:
    """Between a look at the chunk and one at the status it may be made; and other nodes may see it late."""
    config = make_job(tokenizer, write_rows(tmp_path / "r.jsonl", ROWS))
    plan, encoding = plan_of(config, tmp_path / "cache")
    with encoding:
        encoding._thread.join()
        last = plan.path(int(plan.streams(config.train.seed, lambda chunk: 0)[0].order(0)[-1]))
        last.rename(tmp_path / "late")
        timer = threading.Timer(0.3, lambda: (tmp_path / "late").rename(last))
        timer.start()
        assert set(together(steps(config, plan, range(13)))[:100]) == ALL
        timer.join()


def test_a_restart_goes_on_with_the_chunks_that_are_there(tmp_path: Path, tokenizer: Path) -> None:
    config = make_job(tokenizer, write_rows(tmp_path / "r.jsonl", ROWS))
    plan, encoding = plan_of(config, tmp_path / "cache")
    Worker.may = threading.Semaphore(5)
    with encoding:
        while len(Worker.done) < 6:
            time.sleep(0.05)
    folder = Path(plan.folders[0])
    made = {path.name: path.stat().st_ino for path in folder.glob("0*")}
    assert len(made) == 5  # the first was there
    damaged = next(iter(sorted(made)))
    tokens = folder / damaged / "tokens.bin"
    tokens.write_bytes(b"\0" + tokens.read_bytes()[1:])
    Worker.may = threading.Semaphore(10**9)
    plan, encoding = plan_of(config, tmp_path / "cache")
    flat = together(everything(config, plan, encoding, range(25)))
    assert set(flat[:100]) == ALL
    kept = {path.name for path in folder.glob("0*") if made.get(path.name) == path.stat().st_ino}
    assert kept == made.keys() - {damaged}
    assert [path for path in folder.iterdir() if path.name.startswith(".")] == []


def test_another_run_of_the_same_rows_goes_on_when_the_first_ends(tmp_path: Path, tokenizer: Path) -> None:
    config = make_job(tokenizer, write_rows(tmp_path / "r.jsonl", ROWS))
    plan, encoding = plan_of(config, tmp_path / "cache")
    folder = Path(plan.folders[0])
    other = FileLock(folder.with_name(f".{folder.name}.lock"), lambda: None)
    found: list[list[str]] = []
    with encoding:
        thread = threading.Thread(target=lambda: found.extend(steps(config, plan, range(13))))
        thread.start()
        time.sleep(0.7)
        assert not found and len(list(folder.glob("0*"))) == 1
        other.close()
        thread.join(timeout=150)
    assert len(found) == 13


def test_labels_of_another_kind_than_the_first_end_the_run(tmp_path: Path, tokenizer: Path) -> None:
    rows = [{"text": f"t{k}", "label": k % 2} for k in range(40)]
    path = write_rows(tmp_path / "r.jsonl", [*rows, *({"text": f"u{k}", "label": [0, 1]} for k in range(40))])
    config = make_job(tokenizer, path)
    plan, encoding = plan_of(config, tmp_path / "cache", "classification")
    with encoding:
        assert "labels" in str(ends(config, plan))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"train": {"epochs": 1}}, "train.epochs"),
        ({"train": {"steps": None}}, "train.steps"),
        ({"data": {"split_ratio": 0.1}}, "data.split_ratio"),
        ({"data": {"prefetch": 0}}, "data.prefetch"),
        ({"data": {"train": [{"path": "a", "epochs": 2}]}}, "data.train"),
        ({"data": {"train": [{"path": "a", "weight": 2}, "b"]}}, "data.train"),
        ({"objective": {"precompute_reference": True}}, "objective.precompute_reference"),
    ],
)
def test_what_needs_all_rows_is_refused(changes: dict, key: str) -> None:
    sections: dict[str, Any] = {"data": {"train": ["x"], "streaming": True}, "train": {"steps": 5}}
    for section, values in changes.items():
        sections[section] = {**sections.get(section, {}), **values}
    with pytest.raises(JobError) as caught:
        require_streamable(job(**sections))
    assert caught.value.key == key and caught.value.remedy


def test_a_worker_process_that_dies_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With real processes: the task travels to them, and their end to the ranks."""
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 4000)
    monkeypatch.setattr(streaming, "_NICENESS", 3)
    config = make_job(make_tokenizer(tmp_path / "model"), write_rows(tmp_path / "r.jsonl", ROWS * 20))
    plan, encoding = plan_of(config, tmp_path / "cache")
    started: list[Process] = []

    class Noted(Process):
        def __init__(self, task: pool.Task) -> None:
            super().__init__(task)
            started.append(self)

    monkeypatch.setattr(pool, "LocalWorker", Noted)
    with encoding:
        while not started or len(list(Path(plan.folders[0]).glob("0*"))) < 2:
            time.sleep(0.02)
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert os.getpriority(os.PRIO_PROCESS, started[0]._process.pid) == min(own + 3, 19)
        started[0]._process.kill()
        with opened(config, plan) as data, pytest.raises(RunError, match="a worker process was killed by signal 9"):
            for step in range(300):
                data.micro_batches(step)
    assert 2 <= len(list(Path(plan.folders[0]).glob("0*"))) < plan.counts[0]
