"""One Ray cluster of our own for all gang tests of a file. This process can be connected to one cluster at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # toy, and for the ranks toy_entry


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    from swift_dist.cluster.devices import Devices
    from swift_dist.cluster.runtime import Cluster
    from swift_dist.config.job import ClusterSection

    saved = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS", "RAY_ADDRESS")}
    os.environ.update(PYTHONPATH=str(HERE), OMP_NUM_THREADS="1")
    os.environ.pop("RAY_ADDRESS", None)
    with Cluster(ClusterSection(nproc_per_node=2)) as running:
        running.start(Devices(use_gpu=False, nproc_per_node=2))
        running.connect()
        yield running
    for name, value in saved.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
