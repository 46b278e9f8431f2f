"""The local launcher: the job runs in this process's Ray cluster, from this terminal.

Ports: a Ray cluster of the job's own listens on 127.0.0.1 only, where the kernel finds free ports. The ranks' store is
bound to port 0 by rank 0, which tells the others.
"""

from __future__ import annotations

import os
import pkgutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_dist.launchers._base import Handle, State, Where, command_line

if TYPE_CHECKING:
    from swift_dist.config import JobConfig


class HereHandle(Handle):
    """A job that this process drives: it runs while `wait` does.

    Args:
        driver: ``module:function`` that runs a job to its end and returns its result.
    """

    def __init__(self, job: JobConfig, driver: str) -> None:
        self._job, self._driver = job, driver
        self._state: State = "waiting"

    def status(self) -> State:
        return self._state

    def wait(self) -> dict[str, Any]:
        self._state = "running"
        try:
            result = pkgutil.resolve_name(self._driver)(self._job)
        except BaseException:
            self._state = "failed"
            raise
        self._state = result["state"]
        return result

    def stop(self) -> None:
        """As Ctrl-C does (from another thread, while `wait` runs)."""
        if self._state == "running":
            os.kill(os.getpid(), signal.SIGTERM)

    def logs(self, follow: bool = False) -> Iterator[str]:
        """Of the ranks, once the run folder is there; the driver's go to this terminal."""
        for path in sorted((Path(self._job.output) / "logs").glob("*.log")) if self._job.output else ():
            yield from path.read_text(errors="replace").splitlines()


class LocalLauncher:
    """On this machine, or on the Ray cluster that the job names."""

    where: Where = "ray"
    no_deployments = ""  # it is what `swift-dist deploy` does itself

    def render(self, job: JobConfig) -> str:
        return command_line(job)

    def submit(self, job: JobConfig) -> HereHandle:
        return HereHandle(job, "swift_dist.job:run")


LAUNCHER = LocalLauncher()
