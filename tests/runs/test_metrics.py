"""metrics.jsonl: what survives a crash, a resume and a follower."""

from __future__ import annotations

import json
import math
import os
import threading

import pytest

from swift_dist.errors import RunError
from swift_dist.runs.metrics import MetricsLog, follow, last_rows, read_metrics


def write_steps(path, first, last, resume=0, **extra):
    log = MetricsLog(path, resume)
    for step in range(first, last + 1):
        log.append({"step": step, "loss": 10.0 / step, **extra})
    log.close()


def test_rows_are_exact_and_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append({"step": 1, "loss": 0.1 + 0.2, "grad_norm": math.inf})
    log.append({"step": 2, "loss": math.nan, "skipped": True})
    log.close()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 0.1 + 0.2, "grad_norm": None}, {"step": 2, "loss": None, "skipped": True}]


def test_resume_drops_later_rows_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 6)
    with path.open("a") as file:
        file.write('{"step": 7, "lo')
    write_steps(path, 5, 6, resume=4, again=True)
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row.get("again", False) for row in rows] == [False] * 4 + [True] * 2
    assert [row.get("resumed_from") for row in rows] == [None] * 4 + [4, None]
    assert path.read_text().count("\n") == 6


def test_from_scratch_starts_empty(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 3)
    MetricsLog(path, 0).close()
    assert read_metrics(path) == []


def test_reading_passes_over_what_is_no_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\nnot json\n[1]\n{"loss": 2}\n\xff\xfe\n{"step": 2}\n{"step": 3')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert read_metrics(tmp_path / "missing") == []


def test_last_rows_of_a_long_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, "pad": "x" * 100}) + "\n" for i in range(1, 5001)))
    rows = last_rows(path)
    assert rows[-1]["step"] == 5000
    assert [r["step"] for r in rows] == list(range(rows[0]["step"], 5001)) and 100 < len(rows) < 1000


def test_a_process_believed_dead_cannot_add_rows_after_the_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    stale = MetricsLog(path)
    stale.append({"step": 1})
    fresh = MetricsLog(path, 1)
    stale.append({"step": 2, "stale": True})
    fresh.append({"step": 2})
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "resumed_from": 1}]
    stale.close()
    fresh.close()


def test_a_full_disk_ends_the_run_with_the_path(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    os.close(log._descriptor)
    log._descriptor = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(RunError, match=r"metrics\.jsonl cannot be written: No space left"):
        log.append({"step": 1})
    log.close()


def collect(path, ending, rows, **options):
    for row in follow(path, ending.is_set, poll_seconds=0.01, **options):
        if row is not None:
            rows.append(row)


def test_follow_sees_rows_once_across_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 5)
    ending, rows = threading.Event(), []
    thread = threading.Thread(target=collect, args=(path, ending, rows))
    thread.start()
    wait_for(lambda: len(rows) == 5)
    write_steps(path, 4, 7, resume=3, again=True)  # replaced and grown between two looks
    wait_for(lambda: len(rows) == 9)
    with path.open("a") as file:  # a row that arrives in two pieces
        file.write('{"step"')
        file.flush()
        file.write(": 8}\n")
    ending.set()
    thread.join(5)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert [bool(row.get("again")) for row in rows[:9]] == [False] * 5 + [True] * 4


def test_follow_only_new_passes_over_what_an_earlier_attempt_left(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 5)
    ending, rows = threading.Event(), []
    looks = follow(path, ending.is_set, only_new=True, poll_seconds=0.01)
    assert next(looks) is None  # first look
    write_steps(path, 4, 6, resume=3)
    ending.set()
    rows = [row for row in looks if row is not None]
    assert [row["step"] for row in rows] == [4, 5, 6]


def wait_for(condition, seconds=30.0):
    import time

    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
