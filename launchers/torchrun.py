"""The torchrun launcher: the same job without Ray, on one machine or on several that each run the same command."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from pydantic import Field

from swift_dist.config.section import Section
from swift_dist.errors import JobError
from swift_dist.launchers._base import command_line
from swift_dist.launchers.local import HereHandle

if TYPE_CHECKING:
    from swift_dist.config import JobConfig

PORTS = range(23000, 24000)
"""Where nodes meet if the endpoint names no port: below the ephemeral range, and derived from the run folder, so that
all nodes of a job agree on it and two jobs on one node rarely do."""


class Options(Section):
    endpoint: str | None = Field(None, description="host[:port] of the first node, where all nodes meet (nnodes > 1)")
    node_rank: int = Field(0, ge=0, description="which of the nodes this machine is; 0 is at the endpoint")


class TorchrunLauncher:
    """Run by hand, or by what the site has (srun, pdsh, mpirun), once on each node."""

    here = True

    def render(self, job: JobConfig) -> str:
        options = job.launch.torchrun
        if job.cluster.nnodes == 1:
            return f"{command_line(job)} --launcher torchrun"
        endpoint(job)
        lines = []
        for rank in range(job.cluster.nnodes):
            launch = job.launch.model_copy(update={"torchrun": options.model_copy(update={"node_rank": rank})})
            line = command_line(job.model_copy(update={"launch": launch}))
            lines.append(f"{line} --launcher torchrun  # on node {rank}")
        return "\n".join(lines)

    def submit(self, job: JobConfig) -> HereHandle:
        if job.cluster.nnodes > 1:
            endpoint(job)
        return HereHandle(job, "swift_dist.torchrun.driver:run")


def endpoint(job: JobConfig) -> str:
    """``host:port`` at which the nodes meet.

    Raises:
        JobError: it is not given, or a node would not know which one it is.
    """
    given, rank = job.launch.torchrun.endpoint, job.launch.torchrun.node_rank
    if not given:
        raise JobError(
            "launch.torchrun.endpoint",
            f"{job.cluster.nnodes} nodes have to know where to meet",
            "--launch.torchrun.endpoint HOST[:PORT] of the first node, the same on all of them",
        )
    if rank >= job.cluster.nnodes:
        raise JobError(
            "launch.torchrun.node_rank", f"{rank}, but there are {job.cluster.nnodes} nodes", "they count from 0"
        )
    if not job.output:
        raise JobError("output", "nodes that start on their own have to be told the run folder", "--output DIR")
    host, _, port = given.rpartition(":") if given.count(":") == 1 else (given, "", "")
    if not port:
        return f"{given}:{PORTS[zlib.crc32(job.output.encode()) % len(PORTS)]}"
    if not port.isdigit() or not host:
        raise JobError("launch.torchrun.endpoint", f"{given!r} is not host:port", "--launch.torchrun.endpoint n1:23456")
    return given


def torchrun_words(job: JobConfig, nproc_per_node: int) -> list[str]:
    """torchrun's own arguments for this node, without the program."""
    several = job.cluster.nnodes > 1
    meeting = endpoint(job) if several else "localhost:0"
    words = [
        *("--nnodes", str(job.cluster.nnodes), "--nproc-per-node", str(nproc_per_node)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", meeting, "--rdzv-id", f"swift_dist-{job.task}"),
        *("--max-restarts", str(job.cluster.max_failures), "--monitor-interval", "0.5"),
    ]
    if several:
        is_host = job.launch.torchrun.node_rank == 0
        words += ["--rdzv-conf", f"is_host={is_host},join_timeout={int(job.cluster.rendezvous_timeout)}"]
    return words


LAUNCHER = TorchrunLauncher()
