"""Metrics to TensorBoard, W&B, SwanLab and MLflow, through their own libraries.

Each reporter has a thread of its own, which also imports its library: no step waits for it, and the first step does
not wait for an import. One that fails says so once and falls silent; the run goes on. A resumed run continues the
same tracker run: its id is kept in trackers.json in the run folder. Offline modes and servers are set the libraries'
own way (WANDB_MODE, SWANLAB_MODE, MLFLOW_TRACKING_URI).
"""

from __future__ import annotations

import importlib.util
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from swift_dist.config import JobConfig, ReportSection
from swift_dist.errors import JobError
from swift_dist.runs.files import read_json, write_json
from swift_dist.runs.metrics import Row

log = logging.getLogger(__name__)

QUEUE_LENGTH = 10_000
CLOSE_SECONDS = 30.0
_GROUPS = {
    "loss": "train/loss",
    "eval_loss": "eval/loss",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "tokens_per_second": "speed/tokens_per_second",
    "step_seconds": "speed/step_seconds",
    "data_wait_seconds": "speed/data_wait_seconds",
    "tflops_per_device": "speed/tflops_per_device",
    "mfu": "speed/mfu",
    "memory_gib": "memory/gib",
}
_PLACES = ("step", "tokens", "skipped", "reason")


def scalars(row: Row) -> dict[str, float]:
    """The numbers of a row under the names that every tracker shows (``train/loss``, ``eval/loss``, ...)."""
    known = {name: row[key] for key, name in _GROUPS.items() if row.get(key) is not None}
    others = {
        f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}": value
        for key, value in row.items()
        if key not in _GROUPS and key not in _PLACES and isinstance(value, float)
    }
    return known | others


def check_trackers(report: ReportSection) -> None:
    """Before a run starts: is every library that it reports to installed?

    Raises:
        JobError: naming the missing one.
    """
    libraries: list[tuple[str, str]] = [("report.trackers", name) for name in report.trackers]
    if report.tensorboard:
        libraries.append(("report.tensorboard", "tensorboard"))
    for key, name in libraries:
        if importlib.util.find_spec(name) is None:
            raise JobError(key, f"{name} is not installed", f"pip install {name}, or leave it out of {key}")


class Sink(Protocol):
    """One opened tracker."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """Event files, through TensorBoard's own writer (torch.utils.tensorboard takes seconds to import)."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(folder), flush_secs=10)
        if first_step:
            # Tells TensorBoard to forget what an earlier attempt wrote from this step on.
            session = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=first_step + 1, session_log=session))

    def log(self, step: int, values: dict[str, float]) -> None:
        summary = self._summary(value=[self._summary.Value(tag=k, simple_value=v) for k, v in values.items()])
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, job: JobConfig, folder: Path, ids: _TrackerIds) -> None:
        import wandb

        self._run = wandb.init(
            project=job.report.project,
            name=job.report.name or folder.name,
            id=ids.get("wandb") or ids.keep("wandb", secrets.token_hex(4)),
            resume="allow",
            dir=str(folder),
            config=_config(job),
        )
        # An axis of our own: W&B's may not go back, and a resumed run does.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


class _SwanLab:
    def __init__(self, job: JobConfig, folder: Path, ids: _TrackerIds) -> None:
        import swanlab

        self._library = swanlab
        swanlab.init(
            project=job.report.project,
            experiment_name=job.report.name or folder.name,
            id=ids.get("swanlab") or ids.keep("swanlab", secrets.token_hex(10) + "0"),  # it wants 21 characters
            resume="allow",
            logdir=str(folder / "swanlog"),
            config=_config(job),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._library.log(values, step=step)

    def close(self) -> None:
        self._library.finish()


class _MLflow:
    def __init__(self, job: JobConfig, folder: Path, ids: _TrackerIds) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        self._client = MlflowClient()
        experiment = self._client.get_experiment_by_name(job.report.project)
        known = ids.get("mlflow")
        if known is not None:
            self._run_id: str = known
            self._client.set_terminated(self._run_id, "RUNNING")
            return
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(job.report.project)
        run = self._client.create_run(experiment_id, run_name=job.report.name or folder.name)
        self._run_id = ids.keep("mlflow", run.info.run_id)
        params = [Param(key, str(value)[:500]) for key, value in _flat(_config(job)).items()]
        for i in range(0, len(params), 100):  # MLflow's limit for one call
            self._client.log_batch(self._run_id, params=params[i : i + 100])

    def log(self, step: int, values: dict[str, float]) -> None:
        at = int(time.time() * 1000)
        self._client.log_batch(self._run_id, metrics=[self._metric(k, v, at, step) for k, v in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


def _config(job: JobConfig) -> dict[str, Any]:
    """The job for a tracker's server, without the environment that its ranks get: that may hold keys."""
    values = job.model_dump(mode="json")
    values["cluster"].pop("env")
    return values


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat


class _TrackerIds:
    """The trackers' run ids, kept in the run folder. Shared by the reporters' threads."""

    def __init__(self, path: Path) -> None:
        self._path, self._mutex = path, threading.Lock()
        self._ids: dict[str, str] = read_json(path) or {}

    def get(self, name: str) -> str | None:
        return self._ids.get(name)

    def keep(self, name: str, run_id: str) -> str:
        with self._mutex:
            self._ids[name] = run_id
            write_json(self._path, self._ids)
        return run_id


class Reporter:
    """One tracker behind a queue: opened, fed and closed in a thread of its own, never in the training loop's.

    Args:
        name: for the warning.
        open_sink: opens the tracker; called at the first row.
    """

    def __init__(self, name: str, open_sink: Callable[[], Sink]) -> None:
        self.name = name
        self._open = open_sink
        self._rows: queue.Queue[Row | None] = queue.Queue(QUEUE_LENGTH)
        self._is_full = False
        self._thread = threading.Thread(target=self._drain, name=f"report-{name}", daemon=True)
        self._thread.start()

    def log(self, row: Row) -> None:
        """Hand over a row; returns at once."""
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            if not self._is_full:
                log.warning("%s takes no more rows (%d wait); later ones are left out there", self.name, QUEUE_LENGTH)
            self._is_full = True

    def close(self, timeout: float) -> None:
        """Let it write what waits, for at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        try:
            self._rows.put(None, timeout=timeout)
            self._thread.join(max(0.0, deadline - time.monotonic()))
        except queue.Full:
            pass
        if self._thread.is_alive():
            log.warning("%s did not take the last rows within %.0f s", self.name, timeout)

    def _drain(self) -> None:
        sink: Sink | None = None
        row: Row | None = {}
        try:
            while (row := self._rows.get()) is not None:
                if sink is None:
                    sink = self._open()
                sink.log(row["step"], scalars(row))
            if sink is not None:
                sink.close()
        except Exception as error:  # a tracker's library may raise anything, and must not end the run
            log.warning("reporting to %s ended: %s: %s; the run goes on", self.name, type(error).__name__, error)
            while row is not None:  # take the rest, so that the queue never fills
                row = self._rows.get()


class Reporters:
    """All reporters of a run."""

    def __init__(self, job: JobConfig, run_dir: Path, first_step: int = 0) -> None:
        ids = _TrackerIds(run_dir / "trackers.json")
        sinks: dict[str, Callable[[], Sink]] = {
            "wandb": lambda: _WandB(job, run_dir, ids),
            "swanlab": lambda: _SwanLab(job, run_dir, ids),
            "mlflow": lambda: _MLflow(job, run_dir, ids),
        }
        self._reporters = [Reporter(name, sinks[name]) for name in dict.fromkeys(job.report.trackers)]
        if job.report.tensorboard:
            folder = run_dir / "tensorboard"
            self._reporters.append(Reporter("tensorboard", lambda: _TensorBoard(folder, first_step)))

    def log(self, row: Row) -> None:
        for reporter in self._reporters:
            reporter.log(row)

    def close(self) -> None:
        deadline = time.monotonic() + CLOSE_SECONDS
        for reporter in self._reporters:
            reporter.close(max(1.0, deadline - time.monotonic()))
