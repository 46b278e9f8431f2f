"""What every launcher offers: render -> artefact, submit -> handle. Its file also declares its `Options`.

A launcher's options are the keys ``launch.<name>.*`` of a job or a deployment: settings of a site, which change nothing
of what is computed.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol

from pydantic import BaseModel

from swift_dist.errors import EXIT_INTERRUPTED, EXIT_JOB_WRONG, JobError, RunError

if TYPE_CHECKING:
    from swift_dist.config import JobConfig
    from swift_dist.config.job import ClusterSection

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


@dataclass(frozen=True)
class Work:
    """What is sent elsewhere: a job, or a deployment.

    Attributes:
        verb: of ``swift-dist``.
        words: after it, without those of launchers.
        output: its folder, absolute.
        cluster: the nodes, devices and CPUs that it needs.
        launch: the options of all launchers.
        is_service: it runs until it is told to end, which SIGTERM does. It has no ranks that are placed together, and
            does not go back into a queue.
        adds_host: the address of the node where it runs is to be added as ``--host``.
    """

    verb: str
    words: tuple[str, ...]
    output: str
    cluster: ClusterSection
    launch: Any
    is_service: bool = False
    adds_host: bool = False

    @classmethod
    def of(cls, work: JobConfig | Work) -> Work:
        """A job as it is sent; what is one already."""
        if isinstance(work, Work):
            return work
        plain = work.model_copy(update={"launch": type(work.launch)()})
        return cls(work.task, tuple(words(plain)), str(work.output), work.cluster, work.launch)

    @property
    def command(self) -> list[str]:
        """What runs it where it arrives."""
        return ["swift-dist", self.verb, *self.words, "--launcher", "local"]


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
    no_deployments: str
    """Why it cannot run `swift-dist deploy`; "": it can. One that can takes `Work` as well, and its handles have
    ``run_beside(words) -> (exit code, stdout)``: a command on the machine where the job was driven first."""

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
    by_task = {"task": job.task, "engine": type(job)(task=job.task).engine}
    return words_of(job, {name for name, value in by_task.items() if getattr(job, name) == value})


def words_of(section: BaseModel, without: Iterable[str] = ()) -> list[str]:
    """All keys of a section that differ from their defaults, as command-line words."""
    left_out = frozenset(without)
    return [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in _changes(section)
        if name not in left_out
    ]


def raise_told(result: Mapping[str, Any]) -> NoReturn:
    """Raise the error that a ``swift-dist --json`` has ended with, as it was raised there.

    Args:
        result: ``{"error": {"message", "key", "remedy"}, "exit_code"}``.
    """
    error, code = result["error"], result["exit_code"]
    message = error["message"].partition("\n  remedy: ")[0]
    if code == EXIT_JOB_WRONG:
        raise JobError(error["key"], message.removeprefix(f"{error['key']}: "), error["remedy"])
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt(message)
    raise RunError(message, error["remedy"])


def _changes(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _changes(value, f"{prefix}{name}.")
        elif value != field.default:
            yield prefix + name, values[name]
