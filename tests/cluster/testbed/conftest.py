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

from slurm import Slurm  # noqa: E402


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
