"""The run folder: what a run leaves behind, who drives it now, and how it is asked to stop.

job.yaml            the resolved job, runnable again as it is
manifest.json       versions, git revision, hashes of data and model, layout, hosts, command lines
status.json         state, step and the driver that holds the folder
metrics.jsonl       a row a step
logs/  tensorboard/  checkpoints/
stop                there while the run is asked to checkpoint and end
meeting.json        there while a run without Ray is on several nodes: where they meet
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from swift_dist.config import JobConfig
from swift_dist.config.load import dump_job, read_yaml
from swift_dist.errors import JobError
from swift_dist.runs import manifest
from swift_dist.runs.files import now, read_json, seconds_since, write_atomically, write_json
from swift_dist.runs.process import ProcessIdentity

State = Literal["running", "done", "failed", "interrupted"]
HEARTBEAT_SECONDS = 15.0
"""A driver rewrites its status at least this often; see `RunFolder.update`."""
SILENT_SECONDS = 4 * HEARTBEAT_SECONDS
"""After this much silence a driver on another machine counts as dead."""


@dataclass(frozen=True)
class Status:
    """What status.json says. `driver` holds the folder while `state` is running."""

    state: State
    driver: ProcessIdentity
    started: str
    updated: str
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    message: str = ""

    @property
    def is_dead(self) -> bool:
        """True if it says running but its driver is gone (killed, or its machine was)."""
        if self.state != "running":
            return False
        if self.driver.is_visible:
            return not self.driver.is_alive
        return seconds_since(self.updated) > SILENT_SECONDS


class RunFolder:
    """One run's folder. Making this object touches nothing; `begin` writes, and needs a job that was validated.

    Only the driver (the process that called `begin`) writes job.yaml, manifest.json and status.json.
    """

    def __init__(self, path: str | Path, is_new: bool = False) -> None:
        self.path = Path(path)
        self._is_new = is_new  # begin must be the one that makes it
        self._mutex = threading.Lock()

    @classmethod
    def for_job(cls, job: JobConfig, root: str | Path = "runs") -> RunFolder:
        """The folder that `job.output` names, or else ``<root>/<task>-<time>``. Looks, and makes nothing.

        The time has microseconds, so that jobs started together by a script do not meet in one folder.

        Raises:
            JobError: if it cannot be a run folder, or holds a run and ``resume: never`` was asked for.
        """
        path = Path(job.output or Path(root) / f"{job.task}-{datetime.now():%Y%m%d-%H%M%S-%f}").absolute()
        folder = cls(path, is_new=job.output is None)
        obstacle = next((p for p in (path, *path.parents) if p.exists()), path)
        if not obstacle.is_dir():
            raise JobError("output", f"{obstacle} is a file", "name a folder")
        if not os.access(obstacle, os.W_OK | os.X_OK):
            raise JobError("output", f"{obstacle} is not writable for you", "name a folder you can write to")
        if folder.job_path.exists() and not folder.exists():
            raise JobError(
                "output", f"{path} holds a job.yaml of your own, which a run would replace", "name a new folder"
            )
        folder._require_place_of_its_own()
        if folder.exists() and job.resume == "never":
            raise JobError(
                "output",
                f"{path} already holds a run and resume is never",
                "name another folder, or leave out --resume never to continue that run",
            )
        return folder

    def _require_place_of_its_own(self) -> None:
        """A run in another run's folder, or around others, would hide them from `runs list`."""
        around = next((parent for parent in self.path.parents if RunFolder(parent).exists()), None)
        if around is not None:
            raise JobError("output", f"{self.path} lies in the run {around}", "name a folder beside it")
        if not self.exists() and self.path.is_dir():
            inside = next((child for child in self.path.iterdir() if RunFolder(child).exists()), None)
            if inside is not None:
                raise JobError(
                    "output", f"{self.path} holds other runs, such as {inside.name}", f"--output {self.path}/NAME"
                )

    @classmethod
    def open(cls, path: str | Path, key: str = "run") -> RunFolder:
        """An existing run.

        Raises:
            JobError: naming `key`, if there is none at `path`.
        """
        folder = cls(path)
        if not folder.exists():
            raise JobError(
                key, f"{path} is not a run folder (no job.yaml and status.json)", "swift-dist runs list shows them"
            )
        return folder

    @property
    def job_path(self) -> Path:
        return self.path / "job.yaml"

    @property
    def manifest_path(self) -> Path:
        return self.path / "manifest.json"

    @property
    def status_path(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def exists(self) -> bool:
        """True if a run was begun here (it may be resumed): a job file alone may be somebody's own."""
        return self.job_path.is_file() and self.status_path.is_file()

    def job(self) -> dict[str, Any]:
        """job.yaml as it stands.

        Raises:
            JobError: if it is missing or not YAML.
        """
        return read_yaml(self.job_path)

    def manifest(self) -> dict[str, Any]:
        return read_json(self.manifest_path) or {}

    def status(self) -> Status | None:
        values = read_json(self.status_path)
        if values is None:
            return None
        try:
            return Status(**{**values, "driver": ProcessIdentity(**values["driver"])})
        except (KeyError, TypeError):
            return None

    def begin(
        self,
        job: JobConfig,
        *,
        layout: dict[str, Any] | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        """Take the folder for this process and write what is known at the start: the first thing a run writes.

        Args:
            job: the validated job; job.yaml gets it with `output` naming this folder.
            layout: the resolved parallel layout, for the manifest.
            command: the command line (default: this process's).

        Raises:
            JobError: if another live driver holds the folder, or it cannot be written.
        """
        job = job.model_copy(update={"output": str(self.path.absolute())})
        try:
            self.path.mkdir(parents=True, exist_ok=not self._is_new)
            self._is_new = False
            with self._guard():
                self._take(job.train.steps)
            try:
                (self.path / "stop").unlink(missing_ok=True)
                write_atomically(self.job_path, dump_job(job))
                for folder in (self.logs, self.checkpoints):
                    folder.mkdir(exist_ok=True)
                self._begin_manifest(job, layout, list(sys.argv if command is None else command))
            except BaseException as error:  # Ctrl-C too: nobody must wait for a driver that never began
                self.update(state="interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
                raise
        except OSError as error:
            raise _cannot_write(self.path, error) from None

    def require_free(self) -> Status | None:
        """The folder's status, if no other live driver holds it.

        Raises:
            JobError: one does.
        """
        held = self.status()
        me = ProcessIdentity.of_this_process()
        if held is not None and held.state == "running" and not held.is_dead and held.driver != me:
            raise JobError(
                "output",
                f"{self.path} is in use: process {held.driver.pid} on {held.driver.host} has driven it "
                f"since {held.started}",
                f"swift-dist runs stop {self.path}, or name another folder",
            )
        return held

    def _take(self, steps: int | None) -> None:
        held = self.require_free()
        step = held.step if held else 0  # of the attempt before, until the first step of this one
        me = ProcessIdentity.of_this_process()
        self._write_status(Status("running", me, started=now(), updated=now(), step=step, steps=steps))

    def _begin_manifest(self, job: JobConfig, layout: dict[str, Any] | None, command: list[str]) -> None:
        driver = ProcessIdentity.of_this_process()
        old = self.manifest()
        attempts = old.get("attempts", [])
        for attempt in attempts:
            if attempt["state"] == "running":  # its driver was killed before it could say so
                attempt["state"] = "dead"
        attempts.append(
            {
                "started": now(),
                "ended": None,
                "state": "running",
                "command": command,
                "directory": str(Path.cwd()),
                "driver": {"host": driver.host, "pid": driver.pid},
                "hosts": [],
                "layout": layout,
                "restarts": [],
            }
        )
        created = old.get("created", now())
        write_json(self.manifest_path, {"created": created, **manifest.describe(job), "attempts": attempts})

    def update(self, **changes: Any) -> None:
        """Rewrite status.json with `changes` (step, loss, steps, message), stamped now. Called by the driver."""
        with self._mutex:
            status = self.status()
            if status is not None:
                self._write_status(dataclasses.replace(status, updated=now(), **changes))

    def set_places(self, hosts: Sequence[str], threads: Sequence[int]) -> None:
        """Note where the ranks of the current attempt live, and with how many threads each computes (index = rank)."""
        self._change_attempt(hosts=list(hosts), threads_per_rank=list(threads))

    def add_restart(self, *, reason: str, from_step: int | None) -> None:
        """Note a restart of the gang within the current attempt."""
        restarts = self.manifest().get("attempts", [{}])[-1].get("restarts", [])
        self._change_attempt(restarts=[*restarts, {"time": now(), "reason": reason, "from_step": from_step}])

    def end(self, state: State, *, message: str = "", step: int | None = None, export_step: int | None = None) -> None:
        """Say how it ended and let the folder go.

        Args:
            state: how.
            message: why, or what else is to be said.
            step: steps done.
            export_step: the step that the exported weights are of.
        """
        noted = {"message": message or None, "export_step": export_step}
        self._change_attempt(state=state, ended=now(), **{k: v for k, v in noted.items() if v is not None})
        self.update(state=state, message=message, **({} if step is None else {"step": step}))
        (self.path / "stop").unlink(missing_ok=True)

    def _change_attempt(self, **changes: Any) -> None:
        with self._mutex:
            values = self.manifest()
            values["attempts"][-1].update(changes)
            write_json(self.manifest_path, values)

    def _write_status(self, status: Status) -> None:
        write_json(self.status_path, dataclasses.asdict(status))

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Held for the moment of taking the folder, so that of two drivers that start together one wins."""
        descriptor = os.open(self.path / ".guard", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            # Some shared file systems know no flock (ENOSYS, ENOLCK): there only the status file protects.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def request_stop(self) -> None:
        """Ask the driver, wherever it runs, to checkpoint and end: it polls `stop_requested`."""
        write_atomically(self.path / "stop", f"asked {now()} by process {os.getpid()}\n")

    def stop_requested(self) -> bool:
        """True once `request_stop` was called for the attempt that runs. One stat call."""
        return (self.path / "stop").exists()


def _cannot_write(path: Path, error: OSError) -> JobError:
    return JobError("output", f"{path} cannot be written: {error.strerror or error}", "name a folder you can write to")
