"""The local launcher: the job runs in this process's Ray cluster, from this terminal."""

from __future__ import annotations

import json
import os
import pkgutil
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from swift_dist.config import JobConfig

DRIVER = "swift_dist.job:run"


class LocalHandle:
    """A job of this process: it runs while `wait` does."""

    def __init__(self, job: JobConfig) -> None:
        self._job = job
        self._state = "waiting"

    def status(self) -> str:
        """waiting, running, done, interrupted or failed."""
        return self._state

    def wait(self) -> dict[str, Any]:
        """Run the job and return its result; raises what the driver raises."""
        self._state = "running"
        try:
            result = pkgutil.resolve_name(DRIVER)(self._job)
        except BaseException:
            self._state = "failed"
            raise
        self._state = result["state"]
        return result

    def stop(self) -> None:
        """Ask it to checkpoint and end, as Ctrl-C does (from another thread, while `wait` runs)."""
        if self._state == "running":
            os.kill(os.getpid(), signal.SIGTERM)

    def logs(self) -> Iterator[Path]:
        """Its log files, once the run folder is there."""
        if self._job.output:
            yield from sorted((Path(self._job.output) / "logs").glob("*.log"))


class LocalLauncher:
    """render -> submit -> handle, on this machine (or on the Ray cluster that the job names)."""

    def render(self, job: JobConfig) -> str:
        """The command line that runs this job."""
        return shlex.join(["swift-dist", job.task, *words(job)])

    def submit(self, job: JobConfig) -> LocalHandle:
        return LocalHandle(job)


def words(job: JobConfig) -> list[str]:
    """The job as command-line words: everything that differs from the defaults."""
    return [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in _changes(job)
        if name != "task"
    ]


def _changes(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _changes(value, f"{prefix}{name}.")
        elif value != field.default:
            yield prefix + name, values[name]


LAUNCHER = LocalLauncher()
