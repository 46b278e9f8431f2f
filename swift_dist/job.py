"""THE page of the driver: job -> layout -> cluster -> placement -> preflight -> gang with restarts -> result."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import yaml

from swift_dist.advice import advice, already_done, announce
from swift_dist.cluster.devices import Devices, choose_devices, gpus_of_this_machine, nproc_from_environment
from swift_dist.cluster.environment import check_environment
from swift_dist.cluster.gang import Gang
from swift_dist.cluster.interrupts import Interrupts
from swift_dist.cluster.notes import RunNotes, Stopwatch, driver_log
from swift_dist.cluster.placement import Demand, Placement, crossing_warning, rank_places
from swift_dist.cluster.plan import GangPlan
from swift_dist.cluster.runtime import Cluster
from swift_dist.cluster.versions import check_versions
from swift_dist.config import JobConfig
from swift_dist.doctor.preflight import bad_nodes, preflight
from swift_dist.errors import JobError
from swift_dist.resolve import ResolvedJob, check_resume, resolve
from swift_dist.runs.folder import RunFolder
from swift_dist.runs.outcome import newest_step
from swift_dist.runs.progress import Monitor
from swift_dist.runs.reporters import check_trackers

if TYPE_CHECKING:
    from swift_dist.launchers._base import Where

log = logging.getLogger(__name__)

ENTRY = "swift_dist.train:main"


def run(job: JobConfig) -> dict[str, Any]:
    """Run a job to its end.

    Returns:
        ``state`` ("done" or "interrupted"), ``output``, ``export`` (folder of the final weights), ``export_step`` (the
        step that they are of), ``message`` (why it stopped early; "" as a rule), ``step``, ``loss``, ``checkpoint``
        (step of the newest), ``restarts`` (failures survived) and ``seconds``.

    Raises:
        JobError: the job is wrong; nothing was written unless a rank found it out.
        RunError: the run failed.
        KeyboardInterrupt: interrupted before anything could be saved, or twice.
    """
    began, stopwatch = time.monotonic(), Stopwatch()
    check_environment(job.cluster)
    check_versions(os.environ)
    with Interrupts() as interrupts, Cluster(job.cluster) as cluster, ExitStack() as beside:
        folder = RunFolder.for_job(job)
        folder.require_free()  # `begin` asks again; here it costs no start of a cluster
        devices = cluster.devices()
        resolved = _resolve(job, folder, devices, encode=True)
        if (result := already_done(folder, resolved)) is not None:
            return {**result, "seconds": round(time.monotonic() - began, 3)}
        stopwatch.lap("checks")
        announce(folder, resolved, num_cpus=os.cpu_count() if cluster.is_own and not devices.use_gpu else None)
        if resolved.encoding is not None:
            beside.enter_context(resolved.encoding)
        cluster.start(devices)
        cluster.connect()
        stopwatch.lap("cluster")
        interrupts.install()  # Ray has set handlers of its own
        demand = Demand.of(job.cluster, devices.nproc_per_node, devices.use_gpu)
        avoid = bad_nodes(resolved.job, demand) if job.cluster.exclude_bad_nodes else set()
        timeouts = job.cluster.placement_timeout, avoid, job.cluster.replacement_timeout
        with Placement(demand, *timeouts) as placement:
            if job.cluster.nnodes > 1 and job.cluster.preflight and not job.cluster.exclude_bad_nodes:
                preflight(resolved.job, placement.node_ids, simulated=cluster.is_own)
            stopwatch.lap("placement and preflight")
            result = _train(folder, resolved, placement, demand, interrupts, stopwatch)
    return {**result, "seconds": round(time.monotonic() - began, 3)}


def prepare(job: JobConfig) -> JobConfig:
    """The job as a launcher sends it elsewhere: checked, every path absolute, its run folder named.

    Raises:
        JobError: as `run` does, and where `cluster.nproc_per_node` is left to the nodes that will run it.
    """
    check_environment(job.cluster)
    asked = job.cluster.nproc_per_node or nproc_from_environment()
    if asked is None:
        raise JobError(
            "cluster.nproc_per_node",
            "how many ranks a node takes cannot be seen from here",
            "--nproc_per_node N, usually the GPUs of a node",
        )
    folder = RunFolder.for_job(job)
    folder.require_free()
    return _resolve_elsewhere(job, folder, asked).job


def _resolve_elsewhere(job: JobConfig, folder: RunFolder, nproc_per_node: int) -> ResolvedJob:
    """For nodes that cannot be seen from here: what GPUs would allow is allowed, unless the job says cpu."""
    return _resolve(job, folder, Devices(job.cluster.accelerator != "cpu", nproc_per_node))


def _resolve(job: JobConfig, folder: RunFolder, devices: Devices, encode: bool = False) -> ResolvedJob:
    """`encode`: rows of a fine-tuning job, which only a job that runs needs encoded."""
    check_trackers(job.report)
    resolved = resolve(
        job,
        nproc_per_node=devices.nproc_per_node,
        on_cuda=devices.use_gpu,
        output=str(folder.path),
        encode=encode,
    )
    if folder.exists():
        check_resume(resolved, folder.path, folder.job())
    return resolved


def _train(
    folder: RunFolder,
    resolved: ResolvedJob,
    placement: Placement,
    demand: Demand,
    interrupts: Interrupts,
    stopwatch: Stopwatch,
) -> dict[str, Any]:
    job = resolved.job
    places = rank_places(resolved.layout, demand)
    plan = GangPlan(ENTRY, resolved.payload(), places, folder.path, job.cluster, use_gpu=demand.gpus > 0)
    folder.begin(job, layout=asdict(resolved.layout))
    stopwatch.lap("run folder")
    with driver_log(folder):
        warning = crossing_warning(resolved.layout, places)
        if warning:
            log.warning("%s", warning)
        try:
            with (
                Monitor(folder, steps=job.train.steps, log_interval=job.train.log_interval),
                Gang(plan, placement, interrupts, RunNotes(folder, stopwatch)) as gang,
            ):
                outcome = gang.run()
        except BaseException as error:
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            folder.end(state, message=str(error))  # type: ignore[arg-type]
            raise
        last = outcome.results.get(0, {})
        message, export_step = last.get("message", ""), last.get("export_step")
        folder.end(outcome.state, step=last.get("step"), message=message, export_step=export_step)
    return {
        "state": outcome.state,
        "output": str(folder.path),
        "export": last.get("export"),
        "export_step": export_step,
        "message": message,
        "step": last.get("step"),
        "loss": last.get("loss"),
        "checkpoint": last.get("checkpoint", newest_step(folder)),
        "restarts": len(outcome.failures),
    }


def describe(job: JobConfig, where: Where = "ray") -> dict[str, Any]:
    """What `run` would do, as plain values: the resolved job, its layout, where each rank would go. Starts nothing.

    Args:
        job: as loaded, or as `prepare` returned it.
        where: who would run it; only what it needs is asked.

    Raises:
        JobError: as `run` does.
    """
    check_environment(job.cluster)
    devices, machine, runs_on = _planned_devices(job, where)
    folder = RunFolder.for_job(job)
    if where == "elsewhere":
        resolved = _resolve_elsewhere(job, folder, devices.nproc_per_node)
    else:
        resolved = _resolve(job, folder, devices)
    demand = Demand.of(job.cluster, devices.nproc_per_node, devices.use_gpu)
    places = rank_places(resolved.layout, demand)
    tokens = resolved.job.train.global_batch_size * resolved.job.data.sequence_length
    steps = resolved.job.train.steps  # None: epochs of rows that are not encoded
    num_cpus = os.cpu_count() if machine and not devices.use_gpu else None
    warning = crossing_warning(resolved.layout, places)
    return {
        "job": resolved.job.model_dump(mode="json"),
        "layout": {**asdict(resolved.layout), "dp": resolved.layout.dp, "expert_dp": resolved.layout.expert_dp},
        "parameters": resolved.shape.num_parameters() if resolved.shape else None,
        "cluster": runs_on,
        "needs": str(demand),
        "ranks": [{"rank": rank, **asdict(place)} for rank, place in enumerate(places)],
        "tokens": {"step": tokens, "all": None if steps is None else tokens * steps},
        "warnings": [*([warning] if warning else []), *advice(resolved, folder, num_cpus)],
    }


def _planned_devices(job: JobConfig, where: Where) -> tuple[Devices, bool, str]:
    """What a job would compute on, whether that is this machine, and in words where it would run."""
    if where == "elsewhere":
        devices = Devices(job.cluster.accelerator == "gpu", job.cluster.nproc_per_node or 1)
        return devices, False, "the cluster it is sent to"
    if where == "machine":
        devices = choose_devices(job.cluster, gpus_of_this_machine(), "this machine", planning=True)
        return devices, True, "machines that each start a part of it, without Ray"
    with Cluster(job.cluster) as cluster:
        devices = cluster.devices(planning=True)
        whose = "a Ray cluster of its own" if cluster.is_own else "the Ray cluster at its address"
        return devices, cluster.is_own, whose


def render_plan(plan: dict[str, Any]) -> Iterator[str]:
    """`describe` for people: YAML that `swift-dist pretrain` would take, then what would be started."""
    yield yaml.safe_dump(plan["job"], sort_keys=False).rstrip()
    layout = ", ".join(f"{name} {value}" for name, value in plan["layout"].items() if value is not None)
    yield f"# layout: {layout}"
    if plan["parameters"]:
        yield f"# parameters: {plan['parameters']:,}"
    in_all = "" if plan["tokens"]["all"] is None else f", {plan['tokens']['all']:,} in all"
    yield f"# tokens: {plan['tokens']['step']:,} in a step{in_all}"
    yield f"# runs on {plan['cluster']}; needs {plan['needs']}"
    yield from (f"# warning: {warning}" for warning in plan["warnings"])
    first, *more = plan["artefact"].rstrip("\n").splitlines()
    yield f"# would run: {first}"
    yield from (f"#     {line}".rstrip() for line in more)


def render_result(result: dict[str, Any]) -> str:
    """The result of `run` for people; of a job that was handed over, where it is."""
    if submission := result.get("submission"):
        where = f" at {submission['address']}" if submission["address"] else ""
        return f"{result['state']} as {submission['id']}{where}\noutput: {result['output']}"
    loss = "" if result["loss"] is None else f", loss {result['loss']:.4f}"
    step = "" if result["step"] is None else f" at step {result['step']}"
    survived = f", {result['restarts']} failures survived" if result["restarts"] else ""
    message = f"\n{result['message']}" if result.get("message") else ""
    text = f"{result['state']}{step}{loss} in {result['seconds']:.1f} s{survived}{message}\noutput: {result['output']}"
    if result.get("export"):
        text += f"\nweights: {result['export']}"
    if result["state"] == "interrupted":
        saved = "nothing is trained yet" if result["checkpoint"] is None else f"checkpoint: step {result['checkpoint']}"
        text += f"\n{saved}; the same command with this --output goes on from it"
    return text
