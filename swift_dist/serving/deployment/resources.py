"""What of a Ray cluster is free for replicas."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping


def fitting(nodes: Iterable[Mapping[str, float]], num_cpus: float, num_gpus: int) -> int:
    """Replicas that nodes with these resources have room for; each lies on one node."""
    return sum(
        min(
            math.floor(node.get("CPU", 0) / num_cpus) if num_cpus else 10**6,
            math.floor(node.get("GPU", 0) / num_gpus) if num_gpus else 10**6,
        )
        for node in nodes
    )


def free_replicas(num_cpus: float, num_gpus: int) -> int:
    """Replicas that the cluster has room for now."""
    import ray._private.state

    return fitting(ray._private.state.available_resources_per_node().values(), num_cpus, num_gpus)


def most_replicas(num_cpus: float, num_gpus: int) -> int:
    """Replicas that the cluster would have room for if nothing else ran."""
    import ray

    return fitting((node["Resources"] for node in ray.nodes() if node["Alive"]), num_cpus, num_gpus)
