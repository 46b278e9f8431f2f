"""What every launcher offers: render -> artefact, submit -> handle. Its file also declares its `Options`.

A launcher's options are the job's keys ``launch.<name>.*``: settings of a site, which change nothing of the training.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import BaseModel

if TYPE_CHECKING:
    from swift_dist.config import JobConfig

Where = Literal["ray", "machine", "elsewhere"]
"""Who drives a job: this process through a Ray cluster, this process on its own machine, or another one."""
State = Literal["waiting", "running", "done", "interrupted", "failed"]
"""Of a submitted job, whatever the system that runs it calls it."""


@dataclass(frozen=True)
class Submission:
    """What is needed to find a submitted job again. Lies in its run folder as submission.json.

    Attributes:
        launcher: its name.
        id: of the job, in the words of the system that runs it.
        address: of that system, where it has one.
    """

    launcher: str
    id: str
    address: str = ""


class Handle(Protocol):
    """A submitted job."""

    def status(self) -> State: ...

    def logs(self, follow: bool = False) -> Iterator[str]:
        """Lines of what it printed; with `follow`, until it ends."""
        ...

    def stop(self) -> None:
        """Ask it to checkpoint and end."""
        ...

    def wait(self) -> dict[str, Any]:
        """Its result (see ``swift_dist.job.run``), once it ended.

        Raises:
            JobError, RunError: what its driver raised, or that it ended without a word.
            KeyboardInterrupt: it was interrupted before anything could be saved.
        """
        ...


class Launcher(Protocol):
    """One way to run a job. Neither `render` nor importing the file needs what it launches with.

    Attributes:
        where: who drives the job. One that goes elsewhere is handed over checked and with absolute paths
            (``swift_dist.job.prepare``), and goes on when this process ends.
    """

    where: Where

    def render(self, job: JobConfig) -> str:
        """What `submit` would start, complete enough to be saved and run by hand."""
        ...

    def submit(self, job: JobConfig) -> Handle: ...

    def attach(self, submission: Submission) -> Handle:
        """The handle of a job that was submitted earlier, perhaps by another process. (Where it went elsewhere.)"""
        ...


def command_line(job: JobConfig) -> str:
    """The command that runs this job where it is typed."""
    return shlex.join(["swift-dist", job.task, *words(job)])


def words(job: JobConfig) -> list[str]:
    """The job as command-line words: everything that differs from the defaults."""
    return [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in _changes(job)
        if name != "task" and (name != "engine" or value != type(job)(task=job.task).engine)
    ]


def _changes(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _changes(value, f"{prefix}{name}.")
        elif value != field.default:
            yield prefix + name, values[name]
