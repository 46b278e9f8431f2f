"""The torchrun launcher: the same job without Ray, on one machine or on several that each run the same command.

Ports: on several nodes one of the band, for the store at which they meet: the first node binds and keeps it. It tries
first the one that follows from the run folder's name, then the next ones, and writes into the run folder which it was.
`launch.torchrun.endpoint` names another. torchrun's agents and the ranks use ports that the kernel finds free.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from swift_dist.config.section import Section
from swift_dist.errors import JobError
from swift_dist.launchers._base import Where, command_line, words
from swift_dist.launchers.local import HereHandle

if TYPE_CHECKING:
    from swift_dist.config import JobConfig

PORTS = range(23000, 24000)
"""Where nodes meet if the endpoint names no port: below the ephemeral range. The first choice is derived from the run
folder; a job that finds it taken takes the next."""


class Options(Section):
    endpoint: str | None = Field(
        None,
        description="host[:port] of the first node, where all meet (default: its hostname and a free port)",
    )
    node_rank: int = Field(0, ge=0, description="which of the nodes this machine is; 0 is the first")


class TorchrunLauncher:
    """Run by hand, or by what the site has (srun, pdsh, mpirun), once on each node."""

    where: Where = "machine"
    no_deployments = "it starts ranks that train, without Ray, which places a deployment's replicas"

    def render(self, job: JobConfig) -> str:
        options = job.launch.torchrun
        _check(job)
        if job.cluster.nnodes == 1:
            return f"{command_line(job)} --launcher torchrun"
        lines = []
        for rank in range(job.cluster.nnodes):
            launch = job.launch.model_copy(update={"torchrun": options.model_copy(update={"node_rank": rank})})
            line = command_line(job.model_copy(update={"launch": launch}))
            lines.append(f"{line} --launcher torchrun  # on node {rank}")
        return "\n".join(lines)

    def submit(self, job: JobConfig) -> HereHandle:
        _check(job)
        return HereHandle(job, "swift_dist.torchrun.driver:run")


def _check(job: JobConfig) -> None:
    rank, nnodes = job.launch.torchrun.node_rank, job.cluster.nnodes
    if rank >= nnodes:
        raise JobError(
            "launch.torchrun.node_rank",
            f"{rank}, but cluster.nnodes is {nnodes}",
            "nodes count from 0; --nnodes N says how many there are",
        )
    if nnodes > 1 and not job.output:
        raise JobError("output", "nodes that start on their own have to be told the run folder", "--output DIR")
    endpoint(job)


def endpoint(job: JobConfig) -> tuple[str, int]:
    """Host and port of the first node, as far as they are given ("" and 0: not).

    Raises:
        JobError: they are none.
    """
    given = job.launch.torchrun.endpoint or ""
    host, colon, port = given.rpartition(":") if given.count(":") == 1 else (given, "", "")
    if colon and not (host and port.isdigit() and 0 < int(port) < 65536):
        raise JobError("launch.torchrun.endpoint", f"{given!r} is not host:port", "--launch.torchrun.endpoint n1:23456")
    return host, int(port or 0)


def differences(job: JobConfig, other: JobConfig) -> dict[str, tuple[str, str]]:
    """Keys in which the jobs that two nodes were given differ, with the words for them ("": the default). Not those of
    launchers, nor how the run folder was named."""
    one, two = ({word.partition("=")[0]: word for word in words(each)} for each in (job, other))
    return {
        key.removeprefix("--"): (one.get(key, ""), two.get(key, ""))
        for key in sorted({*one, *two})
        if one.get(key) != two.get(key) and not key.startswith(("--launch.", "--output", "--resume"))
    }


def first_port(run: Path) -> int:
    """Index in `PORTS` of the port that a run tries first."""
    return zlib.crc32(str(run).encode()) % len(PORTS)


def torchrun_words(job: JobConfig, nproc_per_node: int, meeting: str | None, address: str | None = None) -> list[str]:
    """torchrun's own arguments for this node, without the program.

    Args:
        job: the job.
        nproc_per_node: ranks on this node.
        meeting: ``host:port`` of a store that is served there already; None: this is the only node.
        address: of this node, as the others reach it (default: what torchrun makes of its host name).
    """
    command = [
        *("--nnodes", str(job.cluster.nnodes), "--nproc-per-node", str(nproc_per_node)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", meeting or "localhost:0", "--rdzv-id", f"swift_dist-{job.task}"),
        # On several nodes torchrun's agents do not count restarts alike, and ranks that count another number than their
        # peers never meet: there a lost rank ends the run, and the same command goes on.
        *("--max-restarts", "0" if meeting else str(job.cluster.max_failures), "--monitor-interval", "0.5"),
    ]
    if meeting:
        command += ["--rdzv-conf", f"is_host=False,join_timeout={max(1, int(job.cluster.rendezvous_timeout))}"]
    if address:
        command += ["--local-addr", address]
    return command


LAUNCHER = TorchrunLauncher()
