"""The verbs `runs list`, `show`, `plot`, `logs` and `stop`. Cheap to import: they must answer at once."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from swift_dist.config import Section
from swift_dist.errors import JobError, RunError
from swift_dist.runs.files import seconds_since
from swift_dist.runs.folder import RunFolder, Status
from swift_dist.runs.logs import follow_logs, read_logs
from swift_dist.runs.metrics import Row, last_rows
from swift_dist.runs.progress import describe, human_seconds
from swift_dist.runs.submission import read_submission
from swift_dist.runs.submitted import ACTIVE, SubmittedJob

MAX_DEPTH = 3


class ListOptions(Section):
    root: str = Field("runs", description="folder that is searched for runs")


class ShowOptions(Section):
    run: str = Field(description="run folder")


class PlotOptions(Section):
    run: str = Field(description="run folder")
    output: str | None = Field(None, description="PNG file to write (default: plot.png in the run folder)")
    smooth: int | None = Field(None, gt=0, description="steps that smoothed lines average over (default: 1/20 of them)")


class LogsOptions(Section):
    run: str = Field(description="run folder")
    rank: tuple[int, ...] = Field((), description="only these ranks (default: all, and the driver)")
    grep: str | None = Field(None, description="only lines in which this regular expression is found")
    lines: int = Field(200, ge=0, description="newest lines shown (0: all); not with follow")
    follow: bool = Field(False, description="go on with new lines until the run ends")


class StopOptions(Section):
    run: str = Field(description="run folder")
    wait: float = Field(0.0, ge=0, description="seconds to wait for its end (0: only ask)")


def list_runs(options: ListOptions) -> dict[str, Any]:
    """Every run below a folder, oldest first.

    Raises:
        JobError: if there is no such folder.
    """
    root = Path(options.root)
    if not root.is_dir():
        raise JobError("root", f"there is no folder {root}", "runs are in ./runs, or where --output put them")
    runs = [_summary(RunFolder(path)) for path in _find_runs(root, MAX_DEPTH)]
    return {"root": str(root), "runs": sorted(runs, key=lambda run: (run["started"] or "", run["run"]))}


def _find_runs(folder: Path, depth: int) -> Iterator[Path]:
    if RunFolder(folder).exists():
        yield folder
    elif depth:
        for child in folder.iterdir():
            if child.is_dir() and not child.is_symlink() and not child.name.startswith("."):
                yield from _find_runs(child, depth - 1)


def _summary(folder: RunFolder) -> dict[str, Any]:
    status = folder.status()
    newest = _newest(folder)
    manifest = folder.manifest()
    return {
        "run": str(folder.path),
        "task": manifest.get("task"),
        "status": _state(status),
        "step": newest["step"] if newest else (status.step if status else 0),
        "steps": status.steps if status else None,
        "loss": newest.get("loss") if newest else None,
        "started": status.started if status else manifest.get("created"),
        "seconds": _duration(status),
    }


def _state(status: Status | None) -> str:
    if status is None:
        return "unknown"
    return "dead" if status.is_dead else status.state


def _duration(status: Status | None) -> float | None:
    """Seconds of the newest attempt."""
    if status is None:
        return None
    alive = status.state == "running" and not status.is_dead
    return seconds_since(status.started) - (0.0 if alive else seconds_since(status.updated))


def _newest(folder: RunFolder) -> Row | None:
    return next((row for row in reversed(last_rows(folder.metrics_path)) if "loss" in row), None)


def render_list(result: dict[str, Any]) -> str:
    if not result["runs"]:
        return f"no runs in {result['root']}"
    rows = [("RUN", "TASK", "STATE", "STEP", "LOSS", "STARTED", "TOOK")]
    for run in result["runs"]:
        rows.append(
            (
                run["run"],
                run["task"] or "-",
                run["status"],
                f"{run['step']}/{run['steps']}" if run["steps"] else str(run["step"]),
                "-" if run["loss"] is None else f"{run['loss']:.4f}",
                (run["started"] or "-")[:19].replace("T", " "),
                "-" if run["seconds"] is None else human_seconds(run["seconds"]),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def show_run(options: ShowOptions) -> dict[str, Any]:
    """One run: its job, state, newest numbers, checkpoints and attempts.

    Raises:
        JobError: if it is no run.
    """
    waiting = SubmittedJob.not_begun(RunFolder(options.run))
    if waiting:
        state, message = waiting.state()
        return {"run": options.run, "status": state, "message": message, "submission": waiting.noted}
    folder = RunFolder.open(options.run)
    status = folder.status()
    rows = last_rows(folder.metrics_path)
    evaluation = next((row for row in reversed(rows) if "eval_loss" in row), None)
    manifest = folder.manifest()
    return {
        **_summary(folder),
        "message": status.message if status else "",
        "driver": {"pid": status.driver.pid, "host": status.driver.host} if status else None,
        "newest": _newest(folder),
        "evaluation": evaluation,
        "checkpoints": sorted(_checkpoint_steps(folder.checkpoints)),
        "attempts": manifest.get("attempts", []),
        "versions": manifest.get("versions", {}),
        "git": manifest.get("git"),
        "submission": read_submission(folder.path),
        "job": folder.job(),
    }


def _checkpoint_steps(folder: Path) -> Iterable[int]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return [int(m[1]) for path in paths if (m := re.fullmatch(r"step_(\d+)", path.name))]


def render_show(result: dict[str, Any]) -> str:
    if "job" not in result:
        return "\n".join(
            [
                f"run          {result['run']}",
                f"state        {result['status']}" + (f": {result['message']}" if result["message"] else ""),
                f"submitted    {_where(result['submission'])}; its run has not begun",
            ]
        )
    job, attempts = result["job"], result["attempts"]
    lines = [
        f"run          {result['run']}",
        f"state        {result['status']}" + (f": {result['message']}" if result["message"] else ""),
        f"task         {result['task']}, engine {job.get('engine')}, {(job.get('train') or {}).get('precision')}",
        f"started      {result['started']}, attempt {len(attempts)}"
        + (f", took {human_seconds(result['seconds'])}" if result["seconds"] is not None else ""),
    ]
    if result["driver"]:
        lines.append(f"driver       process {result['driver']['pid']} on {result['driver']['host']}")
    if result["submission"]:
        lines.append(f"submitted    {_where(result['submission'])}")
    if attempts and attempts[-1].get("layout"):
        layout = ", ".join(f"{k} {v}" for k, v in attempts[-1]["layout"].items() if v not in (None, 1, False))
        lines.append(f"layout       {layout or 'one rank'}")
    restarts = sum(len(a.get("restarts", [])) for a in attempts)
    if restarts:
        lines.append(f"restarts     {restarts}, the last: {attempts[-1]['restarts'][-1:] or 'in an earlier attempt'}")
    if result["newest"]:
        lines.append(f"newest       {describe(result['newest'], result['steps'], None)}")
    if result["evaluation"]:
        lines.append(f"evaluation   {describe(result['evaluation'], None, None)}")
    lines.append("checkpoints  " + (", ".join(map(str, result["checkpoints"])) or "none"))
    return "\n".join(lines)


def _where(submission: dict[str, Any]) -> str:
    address = f" at {submission['address']}" if submission.get("address") else ""
    return f"{submission.get('submitted')} to {submission.get('launcher')} as {submission.get('id')}{address}"


def plot_run(options: PlotOptions) -> dict[str, Any]:
    """Draw a run's curves.

    Raises:
        JobError: if it is no run, or the PNG cannot be written there.
        RunError: if it has no step yet.
    """
    folder = RunFolder.open(options.run)
    target = Path(options.output) if options.output else folder.path / "plot.png"
    if not target.absolute().parent.is_dir():
        raise JobError("output", f"there is no folder {target.parent}", "make it, or name another file")
    from swift_dist.runs.plot import draw_run

    steps = draw_run(
        folder.metrics_path, target, title="/".join(folder.path.absolute().parts[-2:]), span=options.smooth
    )
    return {"run": str(folder.path), "plot": str(target), "num_steps": steps}


def render_plot(result: dict[str, Any]) -> str:
    return f"{result['plot']} ({result['num_steps']} steps)"


def run_logs(options: LogsOptions) -> dict[str, Any]:
    """Lines of a run's logs. With `follow`, ``lines`` is an iterator that goes on until the run ends.

    Raises:
        JobError: if it is no run, or `grep` is no regular expression.
    """
    waiting = SubmittedJob.not_begun(RunFolder(options.run))
    folder = RunFolder(options.run) if waiting else RunFolder.open(options.run)
    if options.grep is not None:
        try:
            re.compile(options.grep)
        except re.error as error:
            raise JobError(
                "grep",
                f"{options.grep!r} is no regular expression: {error}",
                "put a backslash before what is meant literally",
            ) from None

    if waiting:
        return {"run": str(folder.path), "lines": _job_lines(waiting, options)}
    missing = [rank for rank in options.rank if not (folder.logs / f"rank_{rank}.log").exists()]
    if missing and not options.follow:
        raise JobError(
            "rank", f"{folder.path} has no log of rank {missing[0]}", "swift-dist runs show tells its layout"
        )

    def ended() -> bool:
        return _state(folder.status()) != "running"

    if options.follow:
        found: Iterable[Any] = follow_logs(folder.logs, ended, ranks=options.rank, pattern=options.grep)
    else:
        found = read_logs(folder.logs, ranks=options.rank, pattern=options.grep)[-options.lines :]
    lines = ({"source": line.source, "text": line.text} for line in found)
    return {"run": str(folder.path), "lines": lines if options.follow else list(lines)}


def _job_lines(job: SubmittedJob, options: LogsOptions) -> Iterable[dict[str, str]]:
    """Of a job whose run has not begun: what the system that holds it has from it."""
    if options.rank:
        raise JobError("rank", f"the run has not begun: its job is {job.state()[0]}", "leave it out")
    pattern = re.compile(options.grep or "")
    lines = ({"source": "job", "text": x} for x in job.handle.logs(follow=options.follow) if pattern.search(x))
    return lines if options.follow else list(lines)[-options.lines :]


def render_logs(result: dict[str, Any]) -> Iterator[str]:
    """Line by line, so that a followed log shows at once."""
    for line in result["lines"]:
        yield f"{line['source']:>8} | {line['text']}"


def stop_run(options: StopOptions) -> dict[str, Any]:
    """Ask a running run to checkpoint and end: by SIGTERM to its driver on this machine, by a stop file elsewhere.

    Raises:
        JobError: if it is no run, or does not run.
        RunError: if it did not end within `wait` seconds.
    """
    folder = RunFolder(options.run)
    if job := SubmittedJob.not_begun(folder):
        return _stop_job(job, options)
    folder = RunFolder.open(options.run)
    status = folder.status()
    if _state(status) == "dead" and (job := SubmittedJob.of(folder)) and job.state()[0] in ACTIVE:
        return _stop_job(job, options)
    if status is None or _state(status) != "running":
        raise JobError("run", f"{folder.path} does not run: it is {_state(status)}", "swift-dist runs list shows them")
    by_signal = status.driver.is_visible
    if by_signal:
        try:
            os.kill(status.driver.pid, signal.SIGTERM)  # is_dead has just compared its start time: it is our driver
        except ProcessLookupError:
            pass  # it ended this moment
        except PermissionError:
            by_signal = False
    if not by_signal:
        folder.request_stop()
    asked_by = "signal" if by_signal else "stop file"
    return _wait_for_end(options, asked_by, lambda: _state(folder.status()), ("running",))


def _stop_job(job: SubmittedJob, options: StopOptions) -> dict[str, Any]:
    """Through the system that holds the job: its run has not begun, or its driver is gone."""
    state = job.handle.status()
    if state not in ACTIVE:
        raise JobError("run", f"{options.run} does not run: its job ({job.where}) is {state}", "swift-dist runs show")
    job.handle.stop()
    return _wait_for_end(options, job.noted["launcher"], job.handle.status, ACTIVE)


def _wait_for_end(
    options: StopOptions, asked_by: str, state: Callable[[], str], active: tuple[str, ...]
) -> dict[str, Any]:
    result = {"run": options.run, "asked_by": asked_by, "ended": False}
    deadline = time.monotonic() + options.wait
    while options.wait:
        if (now := state()) not in active:
            return {**result, "ended": True, "status": now}
        if time.monotonic() > deadline:
            raise RunError(f"{options.run} still runs {options.wait:g} s after it was asked to end", "wait longer")
        time.sleep(0.2)
    return result


def render_stop(result: dict[str, Any]) -> str:
    if result["ended"]:
        return f"{result['run']} has ended: {result['status']}"
    return f"{result['run']} was asked to checkpoint and end ({result['asked_by']})"
