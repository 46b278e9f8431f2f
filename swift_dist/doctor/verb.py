"""`swift-dist doctor`: the nodes that a job would run on, examined, as a table with what to do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import Field

from swift_dist.config import JobConfig, Section
from swift_dist.config.job import ClusterSection
from swift_dist.errors import EXIT_DONE, EXIT_FAILED, JobError

if TYPE_CHECKING:
    from swift_dist.doctor.team import BaseTeam
    from swift_dist.doctor.values import Finding

THROUGH_RAY = ("local", "ray")
"""Launchers whose nodes are those of a Ray cluster."""
_REACH_SHARE = 0.5
"""Of the time, for the first word of every node."""


class DoctorOptions(Section):
    job: str | None = Field(None, description="job file whose needs are looked at (space, GPUs, tokens, ranks)")
    launcher: str = Field("local", description="the job's; one that uses no Ray: this node alone is looked at")
    output: str | None = Field(None, description="run folder of the job (default: the job's, else ./runs)")
    checks: tuple[str, ...] = Field((), description="only these checks (default: all)")
    short: bool = Field(False, description="only what is looked at before every job of several nodes")
    timeout: float = Field(60.0, gt=0, description="seconds that all of it may take")
    cluster: ClusterSection = ClusterSection()


def look_over(options: DoctorOptions) -> dict[str, Any]:
    """Examine this machine, or every node of the cluster.

    Returns:
        ``healthy``, ``nodes``, ``findings`` (check, node, level, found, advice), ``seconds`` in all,
        ``check_seconds`` and ``exit_code`` (1 if something is bad).

    Raises:
        JobError: the job, an option, or a check that is asked for is wrong.
        RunError: the job's own cluster did not start.
    """
    from dataclasses import asdict

    from swift_dist.doctor.examine import all_checks, examine

    began = time.monotonic()
    checks = all_checks(options.checks, options.short)
    job = _job(options)
    with _team(options, job) as (team, findings):
        report = examine(team, checks)
        nodes = [node.name for node in team.nodes]
    findings += report.findings
    bad = any(finding.level == "bad" for finding in findings)
    return {
        "healthy": not bad,
        "nodes": nodes,
        "only_this_node": options.launcher not in THROUGH_RAY,
        "findings": [{k: v for k, v in asdict(f).items() if k != "nodes"} for f in findings],
        "seconds": round(time.monotonic() - began, 1),
        "check_seconds": report.seconds,
        "exit_code": EXIT_FAILED if bad else EXIT_DONE,
    }


def _job(options: DoctorOptions) -> JobConfig:
    """The job of the file, with what was given on the command line in place of its own."""
    from swift_dist.config.aliases import JOB_ALIASES
    from swift_dist.config.load import build, read_yaml
    from swift_dist.plugins import UnknownPlugin, find

    try:
        find("swift_dist.launchers", options.launcher, "LAUNCHER")
    except UnknownPlugin as error:
        raise JobError("launcher", str(error), f"--launcher {(error.suggestions or error.known)[0]}") from None
    given = {f"cluster.{name}": getattr(options.cluster, name) for name in options.cluster.model_fields_set}
    if options.output:
        given["output"] = options.output
    return build(JobConfig, [read_yaml(options.job) if options.job else {}, given], JOB_ALIASES)


@contextmanager
def _team(options: DoctorOptions, job: JobConfig) -> Iterator[tuple[BaseTeam, list[Finding]]]:
    """The nodes to examine, and what is already known to be bad about them."""
    from swift_dist.cluster.runtime import Cluster
    from swift_dist.doctor.team import LocalTeam, RayTeam
    from swift_dist.doctor.values import Node
    from swift_dist.doctor.wanted import exam_of

    with Cluster(job.cluster) as cluster:
        if options.launcher == "ray" and cluster.is_own:
            raise JobError(
                "cluster.address",
                "the launcher ray hands a job to a cluster, and none is named",
                "--cluster.address HOST:PORT, or RAY_ADDRESS",
            )
        alone = options.launcher not in THROUGH_RAY or (cluster.is_own and job.cluster.nnodes == 1)
        if alone:
            import socket

            node = Node(socket.gethostname())
            yield (
                LocalTeam(node, exam_of(job, [node], nnodes=1, simulated=False), time.monotonic() + options.timeout),
                [],
            )
            return
        began = time.monotonic()
        nodes, findings = _cluster_nodes(cluster, options, job)
        if cluster.is_own:  # a real one is there already
            began = time.monotonic()
        nnodes = job.cluster.nnodes if options.job or cluster.is_own else len(nodes)
        exam = exam_of(job, nodes, nnodes=nnodes, simulated=cluster.is_own)
        team = RayTeam(nodes, exam, began + options.timeout, options.timeout * _REACH_SHARE)
        try:
            yield team, [*findings, *team.unreached]
        finally:
            team.close()


def _cluster_nodes(cluster: Any, options: DoctorOptions, job: JobConfig) -> tuple[list[Any], list[Finding]]:
    """Those that could take a part of the job; all of them where too few could, or no job is given."""
    from swift_dist.cluster.devices import Devices, gpus_of_this_machine, nproc_from_environment
    from swift_dist.cluster.placement import Demand, what_is_missing
    from swift_dist.doctor.preflight import alive_nodes, fits
    from swift_dist.doctor.values import ALL, Finding

    ranks = job.cluster.nproc_per_node or nproc_from_environment() or 1
    if cluster.is_own:
        use_gpu = job.cluster.accelerator != "cpu" and gpus_of_this_machine() >= ranks
        cluster.start(Devices(use_gpu, ranks))
    cluster.connect()
    nodes = alive_nodes()
    if not options.job:
        return nodes, []
    most = max((int(node.resources.get("GPU", 0)) for node in nodes), default=0)
    wants_gpu = job.cluster.accelerator == "gpu" or (job.cluster.accelerator == "auto" and most > 0)
    demand = Demand.of(job.cluster, job.cluster.nproc_per_node or (max(1, most) if wants_gpu else ranks), wants_gpu)
    missing = what_is_missing(demand, [node.resources for node in nodes])
    if missing is None:
        return [node for node in nodes if fits(node, demand)], []
    advice = "ask for fewer or smaller nodes, or add nodes to the cluster"
    return nodes, [Finding("nodes", ALL, "bad", missing, advice)]


def render(result: dict[str, Any]) -> Iterator[str]:
    """A table for people: worst last word first, and below each failure what to do."""
    rows = result["findings"]
    widths = [max(len(row[name]) for row in rows) for name in ("check", "node")]
    for row in rows:
        yield f"{row['level']:4}  {row['check']:{widths[0]}}  {row['node']:{widths[1]}}  {row['found']}"
        if row["advice"]:
            yield f"{'':4}  {'':{widths[0]}}  {'':{widths[1]}}  -> {row['advice']}"
    counts = {level: sum(row["level"] == level for row in rows) for level in ("bad", "warn")}
    nodes = f"{len(result['nodes'])} node{'s' * (len(result['nodes']) != 1)}"
    yield f"{nodes} in {result['seconds']:.1f} s: {counts['bad']} bad, {counts['warn']} to look at"
    if result["only_this_node"]:
        yield "this node alone: a launcher without Ray starts nothing elsewhere; run it once on each node"
