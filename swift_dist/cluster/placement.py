"""Where the ranks go: what a job needs, whether the cluster has it, and one placement bundle per node."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swift_dist.config.job import ClusterSection
from swift_dist.errors import JobError, RunError
from swift_dist.parallel import ParallelLayout
from swift_dist.parallel.nodes import Place, crossing_groups, place_ranks


@dataclass(frozen=True)
class Demand:
    """What a job needs: `nnodes` nodes that each have `cpus` logical CPUs and `gpus` GPUs for `ranks` ranks."""

    nnodes: int
    ranks: int
    cpus: float
    gpus: int

    @classmethod
    def of(cls, settings: ClusterSection, nproc_per_node: int, use_gpu: bool) -> Demand:
        gpus = nproc_per_node if use_gpu else 0
        return cls(settings.nnodes, nproc_per_node, settings.cpus_per_rank * nproc_per_node, gpus)

    @property
    def bundle(self) -> dict[str, float]:
        return {"CPU": self.cpus, **({"GPU": float(self.gpus)} if self.gpus else {})}

    def __str__(self) -> str:
        what = f"{self.gpus} GPUs and " if self.gpus else ""
        return f"{self.nnodes} node{'s' * (self.nnodes > 1)} with {what}{self.cpus:g} CPUs each"


def what_is_missing(demand: Demand, nodes: Sequence[Mapping[str, float]]) -> str | None:
    """Why the demand can never be met by nodes with these total resources; None: it can."""
    fitting = [n for n in nodes if all(n.get(name, 0) >= amount for name, amount in demand.bundle.items())]
    if len(fitting) >= demand.nnodes:
        return None
    kinds: dict[str, int] = {}
    for node in nodes:
        text = f"{node.get('GPU', 0):g} GPUs, {node.get('CPU', 0):g} CPUs"
        kinds[text] = kinds.get(text, 0) + 1
    inventory = "; ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items(), reverse=True))
    have = f"{len(fitting)} such node{'s' * (len(fitting) != 1)}"
    return f"the job needs {demand}; the cluster has {have} (of {len(nodes)}: {inventory or 'none'})"


def require_placeable(demand: Demand, nodes: Sequence[Mapping[str, float]]) -> None:
    """Refuse a demand that the cluster can never meet.

    Raises:
        JobError: saying what is missing, and which key to change.
    """
    missing = what_is_missing(demand, nodes)
    if missing is None:
        return
    key = "cluster.nproc_per_node"
    if demand.nnodes > len(nodes):
        key = "cluster.nnodes"
    elif not demand.gpus:
        key = "cluster.cpus_per_rank"
    raise JobError(key, missing, "ask for fewer or smaller nodes, or add nodes to the cluster")


def rank_places(layout: ParallelLayout, demand: Demand) -> tuple[Place, ...]:
    """The rank map: for every rank its node and local rank."""
    return place_ranks(layout, [demand.ranks] * demand.nnodes)


def crossing_warning(layout: ParallelLayout, places: Sequence[Place]) -> str | None:
    """A warning if a group that talks in every layer has ranks on more than one node."""
    for axis, size in (("tp", layout.tp), ("cp", layout.cp), ("ep", layout.ep)):
        crossing = crossing_groups(layout, places, axis)  # type: ignore[arg-type]
        if crossing:
            return (
                f"{axis.upper()} groups of {size} ranks span nodes ({len(crossing)} of them, e.g. ranks "
                f"{list(crossing[0])}): every layer will wait for the network between the nodes"
            )
    return None


class Placement:
    """Reserved bundles: bundle i is node i of the job. A context manager that gives them back.

    Attributes:
        node_ids: Ray's id of each node.
        addresses: and its address.
    """

    def __init__(self, demand: Demand, timeout: float, avoid: Collection[str] = ()) -> None:
        """Reserve, waiting at most `timeout` seconds for resources that are in use.

        Args:
            avoid: Ray's ids of nodes that get none of the bundles.

        Raises:
            JobError: the cluster can never place the job.
            RunError: it could, but not within `timeout`.
        """
        import ray
        from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

        alive = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in avoid]
        require_placeable(demand, [node["Resources"] for node in alive])
        strategy = "STRICT_SPREAD" if demand.nnodes > 1 else "STRICT_PACK"
        selector = [{"ray.io/node-id": f"!in({','.join(sorted(avoid))})"}] * demand.nnodes if avoid else None
        self.group = placement_group([demand.bundle] * demand.nnodes, strategy=strategy, bundle_label_selector=selector)
        began = time.monotonic()
        try:
            if not self.group.wait(timeout):
                free = ray.available_resources()
                raise RunError(
                    f"{demand} were not free within {time.monotonic() - began:.0f} s "
                    f"(cluster.placement_timeout); free now: {free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs",
                    "wait for other jobs on the cluster, or raise cluster.placement_timeout",
                )
        except BaseException:
            remove_placement_group(self.group)
            raise
        table = placement_group_table(self.group)["bundles_to_node_id"]
        self.node_ids = [table[index] for index in range(demand.nnodes)]
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in alive}
        self.addresses = [addresses[node_id] for node_id in self.node_ids]

    def options(self, node: int, cpus: float, gpus: int) -> dict[str, Any]:
        """Options that create an actor on a node of the job."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return {
            "num_cpus": cpus,
            "num_gpus": gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=node),
        }

    def __enter__(self) -> Placement:
        return self

    def __exit__(self, *exc_info: object) -> None:
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(self.group)
