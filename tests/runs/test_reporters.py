"""Reporters: real TensorBoard files; trackers through their real libraries where those are installed."""

from __future__ import annotations

import importlib.util
import logging
import sys
import threading
import time
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from swift_dist.config import JobConfig
from swift_dist.errors import JobError
from swift_dist.runs import reporters
from swift_dist.runs.files import read_json
from swift_dist.runs.metrics import read_metrics
from swift_dist.runs.recorder import Recorder
from swift_dist.runs.reporters import Reporter, Reporters, check_trackers


def job(**report) -> JobConfig:
    return JobConfig.model_validate({"report": {"tensorboard": False, **report}, "cluster": {"env": {"KEY": "secret"}}})


def row(step, **values):
    return {"step": step, "loss": 1.0 / step, "lr": 0.1, **values}


def report(values: JobConfig, folder: Path, steps, first_step=0):
    all_of_them = Reporters(values, folder, first_step)
    for step in steps:
        all_of_them.log(row(step))
    all_of_them.log({"step": steps[-1], "eval_loss": 0.5})
    all_of_them.close()


def test_tensorboard_files_hold_the_rows_and_forget_rewound_steps(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report(job(tensorboard=True), tmp_path, range(1, 7))
    time.sleep(1.1)  # event files are named by the second and read in that order
    report(job(tensorboard=True), tmp_path, range(4, 9), first_step=3)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss", "train/lr", "eval/loss"]
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert events.Scalars("train/loss")[3].value == pytest.approx(0.25)


def test_a_missing_library_is_refused_before_the_run(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name))
    with pytest.raises(JobError, match=r"^report\.trackers: wandb is not installed\n  remedy: pip install wandb"):
        check_trackers(job(trackers=["wandb"]).report)
    check_trackers(job(tensorboard=True).report)


def test_a_tracker_that_fails_warns_once_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    class Broken(types.ModuleType):
        @staticmethod
        def init(**arguments):
            raise ConnectionError("no server")

    monkeypatch.setitem(sys.modules, "wandb", Broken("wandb"))
    with caplog.at_level(logging.WARNING):
        report(job(trackers=["wandb"]), tmp_path, range(1, 50))
    messages = [r.getMessage() for r in caplog.records]
    assert messages == ["reporting to wandb ended: ConnectionError: no server; the run goes on"]


def test_a_tracker_that_hangs_holds_up_neither_steps_nor_the_end(monkeypatch, caplog):
    release = threading.Event()

    class Hangs:
        def log(self, step, values):
            release.wait(30)

        def close(self):
            pass

    monkeypatch.setattr(reporters, "QUEUE_LENGTH", 5)
    reporter = Reporter("slow", Hangs)
    started = time.monotonic()
    for step in range(1, 100):
        reporter.log(row(step))
    assert time.monotonic() - started < 10
    reporter.close(timeout=0.2)
    assert time.monotonic() - started < 20
    release.set()
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 2 and "takes no more rows" in messages[0] and "did not take the last rows" in messages[1]


def test_an_error_while_closing_does_not_hold_up_the_end():
    class FailsLast:
        def log(self, step, values):
            pass

        def close(self):
            raise ConnectionError("gone")

    reporter = Reporter("x", FailsLast)
    reporter.log(row(1))
    started = time.monotonic()
    reporter.close(timeout=10)
    assert time.monotonic() - started < 8


def test_wandb_is_called_as_its_documentation_says(tmp_path, monkeypatch):
    """The calls: project, name, one id for ever, an axis that may go back, no environment in the config."""
    calls = []

    class Run:
        def define_metric(self, *args, **kwargs):
            calls.append(("define_metric", args, kwargs))

        def log(self, values):
            calls.append(("log", values))

        def finish(self):
            calls.append(("finish",))

    fake = types.ModuleType("wandb")
    fake.init = lambda **kwargs: calls.append(("init", kwargs)) or Run()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        report(job(trackers=["wandb"], project="p"), tmp_path, [1])
    first, second = (c[1] for c in calls if c[0] == "init")
    assert (first["project"], first["name"], first["id"], first["resume"]) == (
        "p",
        tmp_path.name,
        second["id"],
        "allow",
    )
    assert len(second["id"]) == 8 and "env" not in first["config"]["cluster"] and "secret" not in str(first)
    assert ("define_metric", ("*",), {"step_metric": "step"}) in calls
    assert ("log", {"train/loss": 1.0, "train/lr": 0.1, "step": 1}) in calls
    assert calls[-1] == ("finish",)


def test_mlflow_keeps_one_run_over_a_resume(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs more than mlflow-skinny
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    report(job(trackers=["mlflow"], project="p"), tmp_path, [1, 2])
    report(job(trackers=["mlflow"], project="p"), tmp_path, [3])
    client = mlflow.tracking.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    assert run.info.run_id == (read_json(tmp_path / "trackers.json") or {})["mlflow"]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3]
    assert run.data.params["optimizer.name"] == "adamw" and run.info.status == "FINISHED"


def test_wandb_offline_writes_its_files(tmp_path, monkeypatch, caplog):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    report(job(trackers=["wandb"]), tmp_path, [1, 2])
    assert not caplog.records and list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_swanlab_offline_writes_its_files(tmp_path, monkeypatch, caplog):
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    report(job(trackers=["swanlab"]), tmp_path, [1, 2])
    assert not [r for r in caplog.records if r.name.startswith("swift_dist")] and list(tmp_path.glob("swanlog/*"))


@dataclass
class Worker:
    run_dir: Path
    rank: int = 0
    world_size: int = 2
    device: str = "cpu"


@dataclass
class Numbers:
    loss: float = 2.0
    grad_norm: float = 1.5
    lr: float = 0.1
    tokens: int = 4096
    skipped: bool = False
    metrics: dict = field(default_factory=dict)
    reason: str = ""


def test_the_recorder_writes_every_documented_key_on_rank_0_only(tmp_path):
    for rank in (1, 0):
        recorder = Recorder(job(), Worker(tmp_path, rank), flops_per_token=1e9, first_step=0)  # type: ignore[arg-type]
        recorder.step(1, Numbers(), seconds=2.0, data_wait=0.25)
        recorder.step(2, Numbers(float("nan"), skipped=True, reason="loss is nan"), seconds=2.0, data_wait=0.0)
        recorder.evaluation(2, 1.75)
        recorder.close()
        assert (tmp_path / "metrics.jsonl").exists() == (rank == 0)
    first, second, evaluation = read_metrics(tmp_path / "metrics.jsonl")
    memory = first.pop("memory_gib")
    assert 0 < memory < 1000
    assert first == {
        "step": 1,
        "loss": 2.0,
        "grad_norm": 1.5,
        "lr": 0.1,
        "tokens": 4096,
        "step_seconds": 2.0,
        "tokens_per_second": 2048.0,
        "tflops_per_device": 1.024,
        "data_wait_seconds": 0.25,
    }
    assert second["skipped"] is True and second["reason"] == "loss is nan" and second["loss"] is None
    assert evaluation == {"step": 2, "eval_loss": 1.75}
