"""Helpers of the gang's tests: a plan that runs `toy_entry`, and an observer that remembers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swift_dist.cluster.failures import Failure
from swift_dist.cluster.plan import GangPlan
from swift_dist.config.job import ClusterSection
from swift_dist.parallel.nodes import Place


class Notes:
    """Remembers what the gang reports."""

    def __init__(self) -> None:
        self.hosts: list[Sequence[str]] = []
        self.threads: list[Sequence[int]] = []
        self.restarts: list[Failure] = []
        self.stop = False

    def placed(self, hosts: Sequence[str], threads: Sequence[int]) -> None:
        self.hosts.append(hosts)
        self.threads.append(threads)

    def restarting(self, cause: Failure, attempt: int) -> None:
        self.restarts.append(cause)

    def stop_requested(self) -> bool:
        return self.stop


def toy_plan(run_dir: Path, payload: dict[str, Any], **settings: Any) -> GangPlan:
    section = ClusterSection(**{"nproc_per_node": 2, "rendezvous_timeout": 30.0, **settings})
    ranks = section.nproc_per_node or 1
    places = tuple(Place(node, local) for node in range(section.nnodes) for local in range(ranks))
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    return GangPlan("toy_entry:main", payload, places, run_dir, section, use_gpu=False)
