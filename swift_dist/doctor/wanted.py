"""What a job needs of its nodes, as the checks want to know it."""

from __future__ import annotations

import importlib
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from swift_dist.cluster.devices import gpus_of_this_machine, nproc_from_environment
from swift_dist.cluster.environment import PASSED, matches
from swift_dist.config import JobConfig
from swift_dist.doctor.values import Exam, Node
from swift_dist.plugins import names

LOOKED_AT = ("HF_*", "XDG_CACHE_HOME", "WANDB_*", "SWANLAB_*", "MLFLOW_*", "GLOO_SOCKET_IFNAME", "NCCL_*")
"""Variables that checks look at. Values of secrets do not travel: see `_shown`."""
_SECRETS = ("*TOKEN", "*KEY", "*SECRET*", "*PASSWORD*")

_STATES = {"adamw": 2, "muon": 2, "sgd": 1}
"""fp32 values that the optimizer keeps of each parameter. Muon: of its matrices one, of the rest two."""


def exam_of(job: JobConfig, nodes: Sequence[Node], *, nnodes: int, simulated: bool) -> Exam:
    """What to examine nodes for.

    Args:
        job: whose needs. Its run folder need not exist; without one it is ./runs.
        nodes: that are there.
        nnodes: that are needed.
        simulated: whether all nodes are this machine.

    Raises:
        JobError: the job's model cannot be read.
    """
    from swift_dist.runs.manifest import versions

    settings = job.cluster
    folder = Path(job.output or "runs").absolute()
    most = max((_gpus(node) for node in nodes), default=0)
    use_gpu = settings.accelerator == "gpu" or (settings.accelerator == "auto" and most > 0)
    ranks = settings.nproc_per_node or nproc_from_environment() or (max(1, most) if use_gpu else 1)
    size = checkpoint_bytes(job)
    return Exam(
        token=secrets.token_hex(4),
        folder=str(next(path for path in (folder, *folder.parents) if path.is_dir())),
        nnodes=nnodes,
        ranks=ranks,
        cpus=settings.cpus_per_rank * ranks,
        gpus=ranks if use_gpu else 0,
        simulated=simulated,
        checkpoint_bytes=size,
        num_checkpoints=num_checkpoints(job) if size else 0,
        held_bytes=_bytes_below(folder / "checkpoints") if size else 0,
        bands=port_bands(job),
        variables=_shown({**_passed(os.environ), **settings.env}),
        hub_ids=_hub_ids(job),
        trackers=tuple(job.report.trackers),
        versions=versions(),
    )


def checkpoint_bytes(job: JobConfig) -> int:
    """Bytes of one checkpoint: parameters, their fp32 master copy (where they are not fp32), optimizer states in fp32.

    Measured on checkpoints of 15 million parameters with adamw: 12.0 bytes a parameter in fp32, 14.0 in bf16.
    0 if the job names no model.

    Raises:
        JobError: the model cannot be read.
    """
    if job.model.path is None and job.model.config is None:
        return 0
    from swift_dist.models import find_family, read_hf_config

    hf_config = read_hf_config(job.model)
    parameters = find_family(hf_config).shape(hf_config).num_parameters()
    weights = 4 if job.train.precision == "fp32" else 2 + 4
    return parameters * (weights + 4 * _STATES[job.optimizer.name])


def num_checkpoints(job: JobConfig) -> int:
    """The most that lie in the run folder at once: `keep`, the one being written, and those that stay for ever."""
    steps, interval = job.train.steps, job.checkpoint.interval
    if not interval:
        return 1
    made = math.ceil(steps / interval) if steps else None
    for_ever = 0
    if job.checkpoint.keep_every and steps:
        for_ever = steps // math.lcm(interval, job.checkpoint.keep_every)
    most = job.checkpoint.keep + 1 + for_ever
    return min(most, made) if made else most


def port_bands(job: JobConfig) -> dict[str, tuple[int, int]]:
    """First and last port of every launcher that has a band, by the launcher's name: what its file's function `band`
    makes of the job, or else `PORTS`."""
    bands = {}
    for name in names("swift_dist.launchers"):
        module = importlib.import_module(f"swift_dist.launchers.{name}")
        ports = module.band(job) if hasattr(module, "band") else getattr(module, "PORTS", None)
        if isinstance(ports, range) and len(ports):
            bands[name] = (ports[0], ports[-1])
    return bands


def _gpus(node: Node) -> int:
    return int(node.resources.get("GPU", 0)) if node.id else gpus_of_this_machine()


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0


def _passed(parent: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in parent.items() if matches(name, PASSED)}


def _shown(variables: Mapping[str, str]) -> dict[str, str]:
    """Those that checks look at; of a secret only that it is there."""
    return {
        name: "set" if value and matches(name, _SECRETS) else value
        for name, value in variables.items()
        if matches(name, LOOKED_AT)
    }


def _hub_ids(job: JobConfig) -> tuple[str, ...]:
    given = [path for path in (job.model.path, job.model.tokenizer) if path]
    return tuple(dict.fromkeys(path for path in given if not Path(path).expanduser().exists()))
