"""Helpers of this folder, and those for whole runs, can be imported by name; the Slurm that its tests share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "system")]

from commands import Command  # noqa: E402
from toy_job import INTERVAL, STEPS, Run, job, write_dataset, write_job  # noqa: E402

from slurm import Slurm  # noqa: E402


@pytest.fixture(scope="session")
def two_node_job(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A job of two nodes with two ranks each: tensor parallel in a node, data parallel between them."""
    folder = tmp_path_factory.mktemp("job")
    values = job(
        write_dataset(folder / "toy"),
        train={"steps": STEPS, "global_batch_size": 16},  # steps slow enough to be disturbed
        checkpoint={"interval": INTERVAL},
        parallel={"tensor_model_parallel_size": 2},
        cluster={"nnodes": 2, "nproc_per_node": 2, "accelerator": "cpu", "threads_per_rank": 1},
    )
    return write_job(folder / "job.yaml", values)


@pytest.fixture(scope="session")
def local(two_node_job: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """That job through the local launcher, undisturbed: what all others are compared with."""
    folder = tmp_path_factory.mktemp("local")
    command = Command(["pretrain", two_node_job, "--output", str(folder / "run"), "--json"], folder)
    try:
        assert command.wait() == 0, command.stderr
    finally:
        command.kill_everything()
    return Run((), folder / "run")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    """The cluster. Its clients, those of the launcher included, find it through the environment."""
    mine = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        for name, value in mine.items():
            patch.setenv(name, value)
        with Slurm() as cluster:
            for name, value in cluster.variables.items():
                patch.setenv(name, value)
            yield cluster
    assert not cluster.root.exists()
