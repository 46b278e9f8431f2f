"""`runs list, show, plot, logs, stop` through the command line, on run folders as a driver leaves them."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from swift_dist import cli
from swift_dist.config import JobConfig
from swift_dist.errors import RunError
from swift_dist.runs.folder import RunFolder
from swift_dist.runs.logs import follow_logs
from swift_dist.runs.metrics import MetricsLog
from swift_dist.runs.plot import draw_run, smooth

JOB = JobConfig.model_validate({"train": {"steps": 40}})


def make_run(path, state="done", steps=40, resume_at=None):
    folder = RunFolder(path)
    folder.begin(JOB, layout={"tp": 2, "pp": 1})
    for first, last in ((1, steps),) if resume_at is None else ((1, resume_at + 3), (resume_at + 1, steps)):
        log = MetricsLog(folder.metrics_path, first - 1)
        for step in range(first, last + 1):
            loss = 9 * math.exp(-step / 10) + 2 + 0.3 * math.sin(step * 1.7)
            log.append({"step": step, "loss": loss, "grad_norm": 1.0, "lr": 1e-3 / step, "tokens_per_second": 5e3})
        log.append({"step": last, "eval_loss": 2.5})
        log.close()
    (folder.checkpoints / f"step_{steps}").mkdir()
    (folder.checkpoints / "step_99.tmp-0").mkdir()
    if state != "running":
        folder.end(state, step=steps)
    return folder


def call(capsys, *words):
    code = cli.main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def driver(tmp_path):
    """A process that drives tmp_path/run until it is told to end, as job.py does."""
    script = """
        import signal, sys, time
        from swift_dist.config import JobConfig
        from swift_dist.runs.folder import RunFolder
        told = []
        signal.signal(signal.SIGTERM, lambda *_: told.append("SIGTERM"))
        folder = RunFolder(sys.argv[1])
        folder.begin(JobConfig.model_validate({"train": {"steps": 40}}))
        print("ready", flush=True)
        while not told and not folder.stop_requested():
            time.sleep(0.05)
        folder.end("interrupted", message=(told or ["stop file"])[0], step=3)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


def test_list_shows_every_state(tmp_path, capsys):
    make_run(tmp_path / "a")
    make_run(tmp_path / "sweep" / "b", "failed", steps=7)
    killed = make_run(tmp_path / "c", "running", steps=5)
    values = json.loads(killed.status_path.read_text())
    values["driver"]["started"] = "1"
    killed.status_path.write_text(json.dumps(values))
    make_run(tmp_path / "d", "running", steps=9)
    code, result = call(capsys, "runs", "list", tmp_path)
    assert code == 0
    assert {(r["run"].rsplit("/")[-1], r["status"], r["step"], r["steps"]) for r in result["runs"]} == {
        ("a", "done", 40, 40),
        ("b", "failed", 7, 40),
        ("c", "dead", 5, 40),
        ("d", "running", 9, 40),
    }
    assert cli.main(["runs", "list", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "RUN" in table.splitlines()[0] and len(table.splitlines()) == 5 and "40/40" in table


def test_list_of_no_folder_and_of_an_empty_one(tmp_path, capsys):
    assert call(capsys, "runs", "list", tmp_path / "missing")[0] == 2
    assert cli.main(["runs", "list", str(tmp_path)]) == 0
    assert "no runs in" in capsys.readouterr().out


def test_show(tmp_path, capsys):
    make_run(tmp_path / "run", "interrupted")
    code, result = call(capsys, "runs", "show", tmp_path / "run")
    assert code == 0, "the exit code is that of the question, not of the run"
    assert result["status"] == "interrupted" and result["checkpoints"] == [40]
    assert result["newest"]["step"] == 40 and result["evaluation"] == {"step": 40, "eval_loss": 2.5}
    assert result["job"]["train"]["steps"] == 40 and result["versions"]["torch"]
    cli.main(["runs", "show", str(tmp_path / "run")])
    text = capsys.readouterr().out
    assert "interrupted" in text and "tp 2" in text and "eval loss 2.5000" in text


@pytest.mark.parametrize("verb", ["show", "plot", "logs", "stop"])
def test_no_run_is_exit_2_and_named(verb, tmp_path, capsys):
    code, result = call(capsys, "runs", verb, tmp_path)
    assert code == 2 and "not a run folder" in result["error"]["message"]
    assert list(tmp_path.iterdir()) == []


def test_plot_draws_what_the_rows_say(tmp_path, capsys):
    from matplotlib.image import imread

    make_run(tmp_path / "run", resume_at=20)
    code, result = call(capsys, "runs", "plot", tmp_path / "run")
    assert code == 0 and result["num_steps"] == 40
    image = imread(result["plot"])
    assert image.shape[0] > 700 and image.shape[1] > 1200
    empty = RunFolder(tmp_path / "empty")
    empty.begin(JOB)
    assert cli.main(["runs", "plot", str(empty.path)]) == 1
    assert cli.main(["runs", "plot", str(tmp_path / "run"), "--output", str(tmp_path / "no" / "x.png")]) == 2


def test_plotted_lines_hold_the_data_and_the_axes_are_named(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self))
    folder = make_run(tmp_path / "run", resume_at=20)
    draw_run(folder.metrics_path, tmp_path / "x.png", title="my run")
    (figure,) = drawn
    assert figure.get_suptitle() == "my run"
    loss, grad, speed, rate = figure.axes
    raw, smoothed, evaluation, mark = loss.get_lines()
    assert list(raw.get_xdata()) == list(range(1, 41)) and raw.get_ydata()[0] == pytest.approx(10.44, abs=0.1)
    assert smoothed.get_ydata()[-1] == pytest.approx(2.1, abs=0.3)
    assert list(evaluation.get_xdata()) == [40] and list(mark.get_xdata()) == [20, 20]
    labels = [axes.get_ylabel() for axes in (loss, grad, speed, rate)]
    assert labels == ["loss (nats / token)", "gradient norm (before clipping)", "tokens / s", "learning rate"]
    assert all(axes.get_xlabel() == "step" for axes in figure.axes)
    assert speed.get_ylim()[0] == 0


def test_smoothing_is_unbiased_at_the_start_and_passes_over_nan():
    assert smooth([3.0] * 5, 10) == pytest.approx([3.0] * 5)
    b = 1 - 2 / 4
    assert smooth([1.0, 2.0], 3)[1] == pytest.approx((2 + b * 1) / (1 + b))
    assert smooth([1.0, math.nan, 1.0], 3) == pytest.approx([1.0, 1.0, 1.0])
    with pytest.raises(RunError):
        draw_run(Path("/nonexistent"), Path("x.png"), title="")


LOGS = {
    "driver.log": "2025-01-01 10:00:00,100 INFO a: started\n2025-01-01 10:00:09,000 INFO a: ended\n",
    "rank_0.log": "2025-01-01 10:00:01,000 INFO b: hello 0\nno stamp of its own\n2025-01-01 10:00:03,000 INFO b: bye\n",
    "rank_10.log": "2025-01-01 10:00:02,000 ERROR c: boom\nTraceback (most recent call last):\n  torn",
}


def test_logs_are_merged_by_time_and_filtered(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    for name, text in LOGS.items():
        (folder.logs / name).write_text(text)
    _, result = call(capsys, "runs", "logs", folder.path)
    assert [(line["source"], line["text"].rpartition(": ")[2]) for line in result["lines"]] == [
        ("driver", "started"),
        ("rank_0", "hello 0"),
        ("rank_0", "no stamp of its own"),
        ("rank_10", "boom"),
        ("rank_10", "Traceback (most recent call last):"),
        ("rank_10", "  torn"),
        ("rank_0", "bye"),
        ("driver", "ended"),
    ]
    _, result = call(capsys, "runs", "logs", folder.path, "--rank", "10", "--grep", "ERROR|torn")
    assert [line["text"] for line in result["lines"]] == ["2025-01-01 10:00:02,000 ERROR c: boom", "  torn"]
    _, result = call(capsys, "runs", "logs", folder.path, "--lines", "1")
    assert [line["text"] for line in result["lines"]] == ["2025-01-01 10:00:09,000 INFO a: ended"]
    assert call(capsys, "runs", "logs", folder.path, "--grep", "(")[0] == 2


def test_following_sees_new_lines_and_new_ranks_and_ends_with_the_run(tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "rank_0.log").write_text("2025-01-01 10:00:01,000 INFO b: one\n")
    ending, found = threading.Event(), []
    thread = threading.Thread(
        target=lambda: found.extend(line.text[-3:] for line in follow_logs(folder, ending.is_set, poll_seconds=0.01))
    )
    thread.start()
    time.sleep(0.1)
    with (folder / "rank_0.log").open("a") as file:
        file.write("2025-01-01 10:00:02,000 INFO b: t")
        file.flush()
        time.sleep(0.1)
        file.write("wo\n")
    (folder / "rank_1.log").write_text("2025-01-01 10:00:03,000 INFO b: end")
    ending.set()
    thread.join(60)
    assert found == ["one", "two", "end"]


def test_follow_through_the_command_line_ends_with_the_run(tmp_path, driver):
    folder = RunFolder(tmp_path / "run")
    (folder.logs / "rank_0.log").write_text("hello\n")
    reader = subprocess.Popen(
        [sys.executable, "-m", "swift_dist.cli", "runs", "logs", str(folder.path), "--follow"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert reader.stdout is not None
    assert reader.stdout.readline().strip() == "rank_0 | hello"  # shown while the run goes on
    driver.send_signal(signal.SIGTERM)
    assert reader.wait(timeout=100) == 0


def test_stop_signals_the_driver_of_this_machine(tmp_path, driver, capsys):
    code, result = call(capsys, "runs", "stop", tmp_path / "run", "--wait", "100")
    assert code == 0 and result["asked_by"] == "signal" and result["ended"] and result["status"] == "interrupted"
    assert RunFolder(tmp_path / "run").status().message == "SIGTERM"
    code, result = call(capsys, "runs", "stop", tmp_path / "run")
    assert code == 2 and "does not run: it is interrupted" in result["error"]["message"]


def test_stop_leaves_a_file_for_a_driver_elsewhere(tmp_path, driver, capsys):
    folder = RunFolder(tmp_path / "run")
    values = json.loads(folder.status_path.read_text())
    values["driver"].update(space="another machine", host="far")
    folder.status_path.write_text(json.dumps(values))
    code, result = call(capsys, "runs", "stop", folder.path, "--wait", "100")
    assert code == 0 and result["asked_by"] == "stop file" and result["ended"]
    assert folder.status().message == "stop file"


def test_stop_never_signals_a_process_that_only_has_the_drivers_number(tmp_path, capsys):
    folder = make_run(tmp_path / "run", "running")
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        values = json.loads(folder.status_path.read_text())
        values["driver"]["pid"] = bystander.pid
        folder.status_path.write_text(json.dumps(values))
        assert call(capsys, "runs", "stop", folder.path)[0] == 2
        time.sleep(0.2)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_stop_says_when_waiting_was_in_vain(tmp_path, capsys):
    folder = make_run(tmp_path / "run", "running")
    values = json.loads(folder.status_path.read_text())
    values["driver"]["space"] = "another machine"
    folder.status_path.write_text(json.dumps(values))
    code, result = call(capsys, "runs", "stop", folder.path, "--wait", "0.3")
    assert code == 1 and "still runs 0.3 s after" in result["error"]["message"]
