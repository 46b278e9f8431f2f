"""What the ranks compute on and how many of them a node takes, where the job leaves it open."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from swift_dist.config.job import ClusterSection
from swift_dist.errors import JobError


@dataclass(frozen=True)
class Devices:
    """One GPU a rank, or none; and ranks per node."""

    use_gpu: bool
    nproc_per_node: int


def choose_devices(settings: ClusterSection, gpus: int, where: str, planning: bool = False) -> Devices:
    """From the job and the GPUs of a node.

    Args:
        settings: the job's cluster section; NPROC_PER_NODE stands in for `cluster.nproc_per_node`.
        gpus: of the node.
        where: whose GPUs these are, for messages.
        planning: nothing will be started: a machine without GPUs may plan for one that has as many as it takes.

    Raises:
        JobError: GPUs are asked for and there are none or too few.
    """
    asked = settings.nproc_per_node or nproc_from_environment()
    use_gpu = settings.accelerator == "gpu" or (settings.accelerator == "auto" and gpus > 0)
    if not use_gpu:
        return Devices(False, asked or 1)
    if planning and asked:
        return Devices(True, asked)
    if gpus == 0:
        raise JobError("cluster.accelerator", f"{where} has no GPU", "--cluster.accelerator cpu")
    if asked and asked > gpus:
        raise JobError(
            "cluster.nproc_per_node",
            f"{asked} ranks need a GPU each; {where} has {gpus}",
            f"--nproc_per_node {gpus}, or --cluster.accelerator cpu",
        )
    return Devices(True, asked or gpus)


def gpus_of_this_machine() -> int:
    """NVIDIA GPUs that processes started here may use. Asks neither torch nor the driver library: a start is quick."""
    present = len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    named = [name for name in visible.split(",") if name.strip() and name.strip() != "-1"]
    return min(present, len(named)) if all(n.strip().isdigit() for n in named) else len(named)


def gpus_per_node(nodes: Sequence[Mapping[str, float]], nnodes: int) -> int:
    """GPUs that each of the `nnodes` best nodes of a cluster has."""
    counts = sorted((int(node.get("GPU", 0)) for node in nodes), reverse=True)
    return counts[nnodes - 1] if len(counts) >= nnodes else (counts[-1] if counts else 0)


def nproc_from_environment() -> int | None:
    """NPROC_PER_NODE, as torchrun and ms-swift know it."""
    value = os.environ.get("NPROC_PER_NODE")
    if not value:
        return None
    if not value.isdigit() or int(value) < 1:
        raise JobError("NPROC_PER_NODE", f"{value!r} is not a number of ranks", "unset it, or use --nproc_per_node")
    return int(value)
