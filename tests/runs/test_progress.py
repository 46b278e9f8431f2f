"""What the driver shows, on a terminal and elsewhere."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import time

import pytest

from swift_dist.config import JobConfig
from swift_dist.runs import progress
from swift_dist.runs.folder import RunFolder
from swift_dist.runs.metrics import MetricsLog
from swift_dist.runs.progress import BarView, LineView, Monitor, TimeLeft, describe, human_count, human_seconds


def row(step, **values):
    return {"step": step, "loss": 2.5, "grad_norm": 1.0, "tokens_per_second": 12345.0, **values}


def test_numbers_for_people():
    assert [human_count(v) for v in (7, 999, 999.6, 12345, 1.2e6, 5e9)] == ["7", "999", "1k", "12.3k", "1.2M", "5G"]
    assert [human_seconds(v) for v in (0, 59.4, 75, 3700)] == ["0:00", "0:59", "1:15", "1:01:40"]


def test_a_line_says_step_loss_speed_and_time_left():
    assert describe(row(5), 10, 65.0) == "step 5/10  loss 2.5000  grad norm 1.000  12.3k tok/s  1:05 left"
    assert describe({"step": 5, "eval_loss": 2.25}, 10, None) == "step 5/10  eval loss 2.2500"
    assert describe({"step": 0, "prepared": 0.25}, 10, None) == "step 0/10  reference model 25%"
    assert describe(row(5, loss=None, skipped=True, reason="loss is nan"), None, None).startswith("step 5  loss nan")


def test_time_left_follows_the_recent_pace_and_survives_a_restart():
    left = TimeLeft(100)
    assert left.seen(1, 0.0) is None
    assert left.seen(2, 10.0) == pytest.approx(980)  # a slow start ...
    for step in range(3, 60):
        seconds = left.seen(step, 10.0 + step - 2)
    assert seconds == pytest.approx(100 - 59, rel=0.05)  # ... is forgotten
    assert left.seen(50, 100.0) is None
    assert left.seen(51, 102.0) == pytest.approx(98)


def test_lines_are_limited_but_never_lose_what_matters(monkeypatch):
    clock = iter([i * 0.1 for i in range(1000)])  # ten steps a second
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    view = LineView(100, 1, stream)
    for step in range(1, 101):
        view.show(row(step, skipped=step == 55, reason="spike"))
        if step == 33:
            view.show({"step": 33, "prepared": 0.5})
            view.show({"step": 33, "eval_loss": 2.0})
    lines = stream.getvalue().splitlines()
    assert 10 <= len(lines) <= 15
    assert lines[0].startswith("step 1/100") and lines[-1].startswith("step 100/100")
    assert any("reference model 50%" in line for line in lines)
    assert any("eval loss 2.0" in line for line in lines) and any("SKIPPED: spike" in line for line in lines)


def test_log_interval_thins_the_lines_out(monkeypatch):
    clock = iter([i * 2.0 for i in range(1000)])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    view = LineView(100, 25, stream)
    for step in range(1, 101):
        view.show(row(step))
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["25/100", "50/100", "75/100", "100/100"]


def test_the_bar_shows_step_loss_speed_and_time_left(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    primary, secondary = pty.openpty()
    with os.fdopen(secondary, "w") as terminal:
        view = BarView(10, terminal)
        view.show({"step": 0, "prepared": 0.5})
        time.sleep(0.05)
        view.show(row(1))
        time.sleep(0.05)
        view.show(row(5))
        view.close()
    written = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed and all was read
        while data := os.read(primary, 65536):
            written += data
    os.close(primary)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.decode())
    assert "step 5/10" in shown and "loss 2.5000" in shown and "12.3k tok/s" in shown and "left" in shown


def test_the_monitor_shows_new_rows_and_keeps_the_status_fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_STATUS_SECONDS", 0.0)
    folder = RunFolder(tmp_path / "run")
    folder.begin(JobConfig.model_validate({"train": {"steps": 9}}))
    old = MetricsLog(folder.metrics_path)
    old.append(row(1, loss=77.0))
    old.append(row(2, loss=77.0))
    old.close()
    stream = io.StringIO()
    with Monitor(folder, steps=9, stream=stream):
        new = MetricsLog(folder.metrics_path, 1)
        new.append(row(2, loss=3.0))
        deadline = time.monotonic() + 100
        while (folder.status().step, folder.status().loss) != (2, 3.0):
            assert time.monotonic() < deadline, folder.status()
            time.sleep(0.02)
        new.append(row(9, loss=1.0))
        new.close()
    text = stream.getvalue()
    assert "77" not in text and "step 2/9  loss 3.0000" in text and "step 9/9  loss 1.0000" in text
    status = folder.status()
    assert status is not None and (status.step, status.loss, status.state) == (9, 1.0, "running")
