"""THE page of the driver without Ray: job -> layout -> torchrun with restarts -> result, once on each node.

The first node's driver takes the run folder, serves the store at which the nodes meet, shows the progress and says how
the run ended; the others wait for it, start their ranks and leave with the same result.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from swift_dist.advice import already_done, announce
from swift_dist.cluster.devices import choose_devices, gpus_of_this_machine
from swift_dist.cluster.environment import NodeFacts, check_environment, environment, num_threads, without_dropped
from swift_dist.cluster.interrupts import Interrupts
from swift_dist.cluster.notes import driver_log
from swift_dist.config import JobConfig
from swift_dist.doctor.preflight import preflight_here
from swift_dist.errors import JobError, RunError
from swift_dist.launchers.torchrun import torchrun_words
from swift_dist.resolve import ResolvedJob, check_resume, resolve
from swift_dist.runs.files import read_json
from swift_dist.runs.folder import RunFolder
from swift_dist.runs.outcome import newest_step
from swift_dist.runs.progress import Monitor
from swift_dist.runs.reporters import check_trackers
from swift_dist.torchrun.meeting import Meeting, found, served
from swift_dist.torchrun.rank import REPORTS

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_SEE_LOGS = "see logs/torchrun_*.log and logs/rank_*.log in the run folder"
_KILL_SECONDS = 40.0  # torchrun gives its ranks 30 s to end after a signal


def run(job: JobConfig) -> dict[str, Any]:
    """Run this node's part of a job to its end; returns and raises what ``swift_dist.job.run`` does."""
    began = time.monotonic()
    check_environment(job.cluster)
    with Interrupts() as interrupts:
        folder = RunFolder.for_job(job)
        devices = choose_devices(job.cluster, gpus_of_this_machine(), "this machine")
        resolved = _resolve(job, folder, devices.nproc_per_node, devices.use_gpu)
        if (result := already_done(folder, resolved)) is not None:
            return {**result, "seconds": round(time.monotonic() - began, 3)}
        if job.launch.torchrun.node_rank == 0:
            announce(folder, resolved, num_cpus=None if devices.use_gpu else os.cpu_count())
            _warn_of_what_is_the_gangs(job)
            result = _lead(folder, resolved, devices.use_gpu, interrupts)
        else:
            result = _follow(folder, resolved, devices.use_gpu, interrupts)
    return {
        "state": result["state"],
        "output": str(folder.path),
        "step": result["step"],
        "loss": result["loss"],
        "checkpoint": result["checkpoint"] if result["checkpoint"] is not None else newest_step(folder),
        "restarts": result["restarts"],
        "seconds": round(time.monotonic() - began, 3),
    }


def _resolve(job: JobConfig, folder: RunFolder, nproc_per_node: int, on_cuda: bool) -> ResolvedJob:
    check_trackers(job.report)
    resolved = resolve(job, nproc_per_node=nproc_per_node, on_cuda=on_cuda, output=str(folder.path))
    if folder.exists():
        check_resume(resolved, folder.path, folder.job())
    return resolved


def _lead(folder: RunFolder, resolved: ResolvedJob, use_gpu: bool, interrupts: Interrupts) -> dict[str, Any]:
    """The first node's part: it also holds the run folder, and serves the store at which the nodes meet."""
    job = resolved.job
    folder.require_free()  # `begin` asks again; here it costs no look at the node
    _look_over(job)
    with served(job, folder) as meeting:
        folder.begin(job, layout=asdict(resolved.layout))
        meeting.publish(folder)
        with driver_log(folder):
            try:
                with Monitor(folder, steps=job.train.steps, log_interval=job.train.log_interval):
                    result = _outcome(_run_ranks(folder, resolved, use_gpu, interrupts, meeting), interrupts)
            except BaseException as error:
                folder.end("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", message=str(error))
                raise
            folder.end(result["state"], step=result["step"])
    return result


def _follow(folder: RunFolder, resolved: ResolvedJob, use_gpu: bool, interrupts: Interrupts) -> dict[str, Any]:
    """Another node's part."""
    meeting = found(resolved.job, folder)
    try:
        _look_over(resolved.job, folder.manifest().get("versions"))
    except (JobError, RunError) as error:
        meeting.refuse(error.message)
        raise
    return _outcome(_run_ranks(folder, resolved, use_gpu, interrupts, meeting), interrupts)


def _look_over(job: JobConfig, versions: dict[str, str] | None = None) -> None:
    if job.cluster.nnodes > 1 and job.cluster.preflight:
        preflight_here(job, versions)


def _warn_of_what_is_the_gangs(job: JobConfig) -> None:
    """Keys of the job that do nothing without Ray."""
    names = ["address", "cpus_per_rank", "placement_timeout", "spares", "stall_timeout", "exclude_bad_nodes"]
    names += ["dashboard", *(["max_failures"] if job.cluster.nnodes > 1 else [])]
    for name in names:
        if getattr(job.cluster, name) != type(job.cluster).model_fields[name].default:
            log.warning("warning: cluster.%s does nothing under torchrun", name)


def _run_ranks(
    folder: RunFolder, resolved: ResolvedJob, use_gpu: bool, interrupts: Interrupts, meeting: Meeting
) -> list[dict[str, Any]]:
    """torchrun with this node's ranks, to its end; what each rank of this node reported last."""
    job = resolved.job
    assert job.cluster.nproc_per_node
    facts = NodeFacts(job.cluster.nproc_per_node, len(os.sched_getaffinity(0)), None, use_gpu)
    with tempfile.TemporaryDirectory(prefix="swift_dist-") as reports:
        variables = {**without_dropped(os.environ), **environment(os.environ, job.cluster, facts), REPORTS: reports}
        alone = job.cluster.nnodes == 1
        if alone or (job.launch.torchrun.node_rank == 0 and job.cluster.threads_per_rank):
            world = job.cluster.nnodes * facts.num_ranks
            # of other nodes this one knows only what the job fixes
            folder.set_places([os.uname().nodename] * world if alone else [], [num_threads(variables)] * world)
        words = torchrun_words(job, job.cluster.nproc_per_node, meeting.endpoint)
        words += ["--log-dir", f"{reports}/torchrun"]  # it wants a folder, in which it writes nothing
        words += ["-m", "swift_dist.torchrun.rank", str(folder.path)]
        log.debug("torchrun %s", " ".join(words))
        with (folder.logs / f"torchrun_{job.launch.torchrun.node_rank}.log").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *words],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # the terminal's Ctrl-C goes to the driver alone
                preexec_fn=_end_with_parent,
            )
            try:
                _wait(process, folder, interrupts, Path(reports), meeting)
            finally:
                _end(process)
        return [read for path in sorted(Path(reports).glob("rank_*.json")) if (read := read_json(path))]


def _end_with_parent() -> None:
    """In the child: if the driver is killed, torchrun gets SIGTERM, and its ranks checkpoint and end."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _wait(
    process: subprocess.Popen[bytes], folder: RunFolder, interrupts: Interrupts, reports: Path, meeting: Meeting
) -> None:
    """Until torchrun ends, or a rank says that starting again would change nothing (torchrun would, all the same). An
    interrupt asks the ranks to checkpoint and end; a second one ends them.

    Raises:
        RunError: a node does not take part.
    """
    interrupts.graceful = True
    asked = False
    while process.poll() is None:
        if interrupts.insistent:
            raise KeyboardInterrupt
        if interrupts.requested and not asked:
            asked = True
            log.info("interrupted: the ranks checkpoint and end")
            folder.request_stop()
        if refusal := meeting.refusal():
            raise RunError(refusal, "swift-dist doctor --launcher torchrun on that node looks further")
        if any(_is_final(path) for path in reports.glob("rank_*.json")):
            return
        time.sleep(0.05)


def _is_final(report: Path) -> bool:
    """A wrong job, or an error that the run itself raised."""
    return (read_json(report) or {}).get("kind") in ("job", "run")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave nothing of torchrun's session."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_KILL_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _outcome(reports: list[dict[str, Any]], interrupts: Interrupts) -> dict[str, Any]:
    """How the newest attempt ended, from what this node's ranks said.

    Raises:
        JobError, RunError: what the first of them failed of.
    """
    newest = max((report["attempt"] for report in reports), default=0)
    reports = [report for report in reports if report["attempt"] == newest]
    results = [report["result"] for report in reports if report["kind"] == "result"]
    failures = sorted((r for r in reports if r["kind"] != "result"), key=lambda r: (r["kind"] == "error", r["time"]))
    if failures:
        first = failures[0]
        if first["kind"] == "job":
            raise JobError(first["key"], first["message"], first["remedy"])
        raise RunError(first["message"], first["remedy"] or _SEE_LOGS)
    if not results:
        if interrupts.requested:
            raise KeyboardInterrupt
        raise RunError("the ranks ended without a word", _SEE_LOGS)
    result = results[0]
    return {**result, "state": "interrupted" if result["stopped"] else "done", "restarts": newest}
