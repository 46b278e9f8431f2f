"""The short form, with which every job of several nodes begins: versions, clocks, shared folder, space, GPUs.

Whatever is bad is fatal: the job ends with exit code 1, through Ray before its run folder is touched. Warnings are
logged.
"""

from __future__ import annotations

import dataclasses
import logging
import socket
import time
from collections.abc import Collection, Mapping

from swift_dist.cluster.placement import Demand
from swift_dist.config import JobConfig
from swift_dist.doctor.examine import Report, all_checks, examine
from swift_dist.doctor.team import LocalTeam, RayTeam, cluster_nodes
from swift_dist.doctor.values import Finding, Node
from swift_dist.doctor.wanted import exam_of
from swift_dist.errors import RunError

log = logging.getLogger(__name__)

REACH_SECONDS = 30.0
"""For the first process on each node, which the ranks' processes would wait for as well."""
CHECK_SECONDS = 6.0


def preflight(job: JobConfig, node_ids: Collection[str], *, simulated: bool) -> None:
    """Look over the nodes on which a job was placed.

    Raises:
        RunError: something is bad; names it and what to do.
    """
    report = _look_over(job, alive_nodes(node_ids), simulated=simulated)
    _warn(report)
    if report.bad:
        raise _error(report.bad)


def preflight_here(job: JobConfig, versions: Mapping[str, str] | None = None) -> None:
    """Look over this node alone, where no Ray reaches the others. Clocks are not compared.

    Args:
        job: a part of which will run here.
        versions: those that it must have (default: its own).

    Raises:
        RunError: as `preflight` does.
    """
    node = Node(socket.gethostname())
    exam = exam_of(job, [node], nnodes=job.cluster.nnodes, simulated=False)
    if versions is not None:
        exam = dataclasses.replace(exam, versions=versions, driver_computes=True)
    report = examine(LocalTeam(node, exam, time.monotonic() + CHECK_SECONDS), all_checks(short=True))
    _warn(report)
    if report.bad:
        raise _error(report.bad)


def bad_nodes(job: JobConfig, demand: Demand) -> set[str]:
    """Ray's ids of the nodes of the cluster that a job should not be placed on.

    Raises:
        RunError: too few are left, or what is bad is not of particular nodes.
    """
    nodes = [node for node in alive_nodes() if fits(node, demand)]
    report = _look_over(job, nodes, simulated=False)
    _warn(report)
    excluded = {name for finding in report.bad for name in finding.nodes}
    common = [finding for finding in report.bad if not finding.nodes]
    if common or len(nodes) - len(excluded) < demand.nnodes:
        raise _error(report.bad, f"{len(nodes) - len(excluded)} good nodes are left, {demand.nnodes} are needed\n")
    for finding in report.bad:
        log.warning("excluded: %s", _line(finding))
    return {node.id for node in nodes if node.name in excluded}


def alive_nodes(ids: Collection[str] | None = None) -> list[Node]:
    """Of the cluster that this process is connected to; only those with these ids."""
    import ray

    return cluster_nodes([n for n in ray.nodes() if n["Alive"] and (ids is None or n["NodeID"] in ids)])


def fits(node: Node, demand: Demand) -> bool:
    """Whether Ray's books have room on a node for its part of a job."""
    return all(node.resources.get(name, 0) >= amount for name, amount in demand.bundle.items())


def _look_over(job: JobConfig, nodes: list[Node], *, simulated: bool) -> Report:
    exam = exam_of(job, nodes, nnodes=job.cluster.nnodes, simulated=simulated)
    team = RayTeam(nodes, exam, time.monotonic() + REACH_SECONDS + CHECK_SECONDS, REACH_SECONDS)
    try:
        report = examine(team, all_checks(short=True))
    finally:
        team.close()
    report.findings[:0] = team.unreached
    log.debug("preflight: %s", report.seconds)
    return report


def _warn(report: Report) -> None:
    for finding in report.findings:
        if finding.level == "warn":
            log.warning("%s", _line(finding))


def _error(bad: list[Finding], introduction: str = "") -> RunError:
    lines = "\n".join(_line(finding) for finding in bad)
    return RunError(
        f"the nodes are not fit for this job:\n{introduction}{lines}",
        "swift-dist doctor looks further; --cluster.preflight false starts the job all the same",
    )


def _line(finding: Finding) -> str:
    return f"{finding.check}, {finding.node}: {finding.found}" + (f" ({finding.advice})" if finding.advice else "")
