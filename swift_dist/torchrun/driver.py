"""THE page of the driver without Ray: job -> layout -> torchrun with restarts -> result, once on each node.

The first node's driver takes the run folder, serves the store at which the nodes meet, shows the progress and says how
the run ended; the others wait for it, start their ranks and leave with the same result.
"""

from __future__ import annotations

import contextlib
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
from swift_dist.cluster.environment import NodeFacts, check_environment, environment, without_dropped
from swift_dist.cluster.interrupts import Interrupts
from swift_dist.cluster.notes import driver_log
from swift_dist.config import JobConfig
from swift_dist.config.load import load_job
from swift_dist.doctor.preflight import preflight_here
from swift_dist.errors import JobError, RunError
from swift_dist.launchers.torchrun import differences, torchrun_words
from swift_dist.lifetime import end_with_parent
from swift_dist.resolve import ResolvedJob, check_resume, resolve
from swift_dist.runs.folder import RunFolder
from swift_dist.runs.outcome import exported, newest_step
from swift_dist.runs.progress import Monitor
from swift_dist.runs.reporters import check_trackers
from swift_dist.torchrun.meeting import Meeting, found, served
from swift_dist.torchrun.rank import REPORTS
from swift_dist.torchrun.reports import FINAL, Reports

log = logging.getLogger(__name__)

_SEE_LOGS = "see logs/torchrun_*.log and logs/rank_*.log in the run folder"
_REMEDY = "\n  remedy: "
_KILL_SECONDS = 40.0  # torchrun gives its ranks 30 s to end after a signal
_WORD_SECONDS = 3.0  # for the node that knows why ranks ended to tell the first
_VERDICT_SECONDS = 10.0  # for the first node to say so in the run folder
_LOOK_SECONDS = 0.5  # between looks into the run folder


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
        "export": exported(folder) if result["state"] == "done" else None,
        "export_step": result["export_step"],
        "message": result["message"],
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
    with served(job, folder) as meeting, resolved.encoding or contextlib.nullcontext():
        folder.begin(job, layout=asdict(resolved.layout))
        meeting.publish(folder)
        with driver_log(folder):
            try:
                _look_over(job)  # in the folder's sight: if this node is not fit, the others are to know
                with Monitor(folder, steps=job.train.steps, log_interval=job.train.log_interval):
                    result = _outcome(_run_ranks(folder, resolved, use_gpu, interrupts, meeting), interrupts)
            except BaseException as error:
                folder.end("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", message=str(error))
                raise
            said = {key: result[key] for key in ("step", "message", "export_step")}
            folder.end(result["state"], **said)
    return result


def _follow(folder: RunFolder, resolved: ResolvedJob, use_gpu: bool, interrupts: Interrupts) -> dict[str, Any]:
    """Another node's part."""
    meeting = found(resolved.job, folder)
    try:
        _require_same(resolved.job, folder)
        _look_over(resolved.job, folder.manifest().get("versions"))
    except (JobError, RunError) as error:
        key = f"{error.key}: " if isinstance(error, JobError) else ""
        meeting.tell(_word("run", f"{os.uname().nodename}: {key}{error.message}"))
        raise
    ends = _run_ranks(folder, resolved, use_gpu, interrupts, meeting)
    if not any(end["kind"] in ("result", *FINAL) for end in ends):
        _raise_what_the_first_node_says(folder)
    return _outcome(ends, interrupts)


def _require_same(job: JobConfig, folder: RunFolder) -> None:
    """The ranks take the job from the run folder, where the first node has put it.

    Raises:
        JobError: this node was given another one.
    """
    for key, (mine, theirs) in differences(job, load_job(folder.job_path, task=None)).items():
        raise JobError(
            key,
            f"{mine or 'not given'} on this node, {theirs or 'not given'} on the first",
            "the same command on every node, but for launch.torchrun.node_rank",
        )


def _word(kind: str, message: str, attempt: int = 0) -> dict[str, Any]:
    """What a driver, not a rank, reports of its node."""
    remedy = "swift-dist doctor --launcher torchrun on that node looks further" if kind == "run" else ""
    return {"kind": kind, "message": message, "remedy": remedy, "attempt": attempt, "time": time.time()}


def _raise_what_the_first_node_says(folder: RunFolder) -> None:
    """Ranks here ended because of others: how the run ended stands in its folder, soon."""
    deadline = time.monotonic() + _VERDICT_SECONDS
    while time.monotonic() < deadline:
        status = folder.status()
        if status is not None and status.state == "failed":
            raise RunError(f"the run has failed: {status.message.partition(_REMEDY)[0]}", _SEE_LOGS)
        if status is not None and status.state == "interrupted":
            raise KeyboardInterrupt
        time.sleep(_LOOK_SECONDS)


def _look_over(job: JobConfig, versions: dict[str, str] | None = None) -> None:
    if job.cluster.nnodes > 1 and job.cluster.preflight:
        preflight_here(job, versions)


def _warn_of_what_is_the_gangs(job: JobConfig) -> None:
    """Keys of the job that do nothing without Ray."""
    names = ["address", "cpus_per_rank", "placement_timeout", "replacement_timeout", "spares", "stall_timeout"]
    names += ["exclude_bad_nodes", "dashboard", *(["max_failures"] if job.cluster.nnodes > 1 else [])]
    for name in names:
        if getattr(job.cluster, name) != type(job.cluster).model_fields[name].default:
            log.warning("warning: cluster.%s does nothing under torchrun", name)


def _run_ranks(
    folder: RunFolder, resolved: ResolvedJob, use_gpu: bool, interrupts: Interrupts, meeting: Meeting
) -> list[dict[str, Any]]:
    """torchrun with this node's ranks, to its end; what each rank of this node reported last (on the first: of all)."""
    job = resolved.job
    assert job.cluster.nproc_per_node
    facts = NodeFacts(job.cluster.nproc_per_node, len(os.sched_getaffinity(0)), None, use_gpu)
    with tempfile.TemporaryDirectory(prefix="swift_dist-") as scratch:
        variables = {**without_dropped(os.environ), **environment(os.environ, job.cluster, facts), REPORTS: scratch}
        reports = Reports(Path(scratch), meeting)
        command = torchrun_words(job, job.cluster.nproc_per_node, meeting.endpoint, meeting.address)
        command += ["--log-dir", f"{scratch}/torchrun"]  # it wants a folder, in which it writes nothing
        command += ["-m", "swift_dist.torchrun.rank", str(folder.path)]
        log.debug("torchrun %s", " ".join(command))
        with (folder.logs / f"torchrun_{job.launch.torchrun.node_rank}.log").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *command],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # the terminal's Ctrl-C goes to the driver alone
                preexec_fn=_end_with_parent,
            )
            try:
                num_ranks = facts.num_ranks
                _wait(process, folder, interrupts, reports, num_ranks, job.cluster.nnodes * num_ranks)
            finally:
                _end(process)
        reports.read()
        _require_met(job, reports, interrupts)
        if silent := reports.silent():
            ranks = ", ".join(str(place["rank"]) for place in silent)
            text = f"rank {ranks} on {silent[0]['host']} ended without a word (killed, out of memory, or crashed)"
            reports.add(_word("error", text, silent[0]["attempt"]))
        if reports.of_all and meeting.endpoint:
            _wait_for_the_cause(reports)
        return reports.ends


def _require_met(job: JobConfig, reports: Reports, interrupts: Interrupts) -> None:
    """
    Raises:
        RunError: torchrun has ended, and no rank had begun: a node did not come.
    """
    if reports.places or reports.ends or interrupts.requested or not reports.of_all or job.cluster.nnodes == 1:
        return
    raise RunError(
        f"no rank began: not all of the {job.cluster.nnodes} nodes came within {job.cluster.rendezvous_timeout:.0f} s "
        "(cluster.rendezvous_timeout), or torchrun could not start",
        "what the command printed on each of the others says why, or logs/torchrun_0.log in the run folder",
    )


def _end_with_parent() -> None:
    """In the child: if the driver is killed, torchrun gets SIGTERM, and its ranks checkpoint and end."""
    end_with_parent(signal.SIGTERM)


def _wait(
    process: subprocess.Popen[bytes],
    folder: RunFolder,
    interrupts: Interrupts,
    reports: Reports,
    num_ranks: int,
    world_size: int,
) -> None:
    """Until torchrun ends, or starting again (which it would, all the same) would change nothing: a rank or another
    node says so, or the first node's driver has ended. An interrupt asks the ranks to checkpoint and end; a second one
    ends them."""
    interrupts.graceful = True
    asked, noted, looked, failed, ended = False, False, 0.0, 0.0, 0.0
    several = world_size > num_ranks
    while process.poll() is None:
        if interrupts.insistent:
            raise KeyboardInterrupt
        if interrupts.requested and not asked:
            asked = True
            log.info("interrupted: the ranks checkpoint and end")
            folder.request_stop()
        reports.read()
        if reports.is_final:
            return
        if several and reports.have_all_ended(num_ranks):  # torchrun would wait for other nodes for five minutes
            ended = ended or time.monotonic()
            if time.monotonic() - ended > _VERDICT_SECONDS:
                return
        if reports.is_lost:  # where collectives do not notice it, nobody else here would
            failed = failed or time.monotonic()
            if time.monotonic() - failed > _WORD_SECONDS:
                return
        if not reports.of_all and time.monotonic() - looked > _LOOK_SECONDS:
            looked = time.monotonic()
            status = folder.status()
            if status is not None and status.state in ("failed", "interrupted"):
                return
        if reports.of_all and not noted and len(places := reports.places) == world_size:
            noted = True
            folder.set_places([place["host"] for place in places], [place["threads"] for place in places])
        time.sleep(0.05)


def _wait_for_the_cause(reports: Reports) -> None:
    """Where ranks of the first node ended because of others, what those say may still be on its way."""
    deadline = time.monotonic() + _WORD_SECONDS
    while all(end["kind"] == "communication" for end in reports.ends) and time.monotonic() < deadline:
        time.sleep(0.05)
        reports.read()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave nothing of torchrun's session."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_KILL_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _outcome(ends: list[dict[str, Any]], interrupts: Interrupts) -> dict[str, Any]:
    """How the newest attempt ended, from what ranks said.

    Raises:
        JobError, RunError: what the first of them failed of.
    """
    results = [end for end in ends if end["kind"] == "result"]
    order = (*FINAL, "error", "communication")
    failures = sorted((e for e in ends if e["kind"] != "result"), key=lambda e: (order.index(e["kind"]), e["time"]))
    if failures:
        first = failures[0]
        if first["kind"] == "job":
            raise JobError(first["key"], first["message"], first["remedy"])
        raise RunError(first["message"], first["remedy"] or _SEE_LOGS)
    if not results:
        if interrupts.requested:
            raise KeyboardInterrupt
        raise RunError("the ranks ended without a word", _SEE_LOGS)
    result = results[0]["result"]
    state = "interrupted" if result["stopped"] else "done"
    return {**result, "state": state, "restarts": results[0]["attempt"]}
