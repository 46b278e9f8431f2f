"""Where the ranks go: what a job needs, whether the cluster has it, and one placement bundle per node."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swift_dist.config.job import ClusterSection
from swift_dist.errors import JobError, RunError
from swift_dist.parallel import ParallelLayout
from swift_dist.parallel.nodes import Place, crossing_groups, place_ranks

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
_VERDICT_SECONDS = 60.0
"""Ray gives a node up when it has missed five looks in 15 s, by default, and after 10 s of grace."""


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


def _alive() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


class Placement:
    """Reserved bundles: bundle i is node i of the job. A context manager that gives them back.

    Attributes:
        node_ids: Ray's id of each node.
        addresses: and its address.
    """

    def __init__(
        self, demand: Demand, timeout: float, avoid: Collection[str] = (), replacement_timeout: float = 0.0
    ) -> None:
        """Reserve, waiting at most `timeout` seconds for resources that are in use.

        Args:
            demand: what the job needs.
            timeout: see above; so long a lost node's bundle may wait for others, too.
            avoid: Ray's ids of nodes that get none of the bundles.
            replacement_timeout: the same where the nodes that are left could never take it.

        Raises:
            JobError: the cluster can never place the job.
            RunError: it could, but not within `timeout`.
        """
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group

        alive = [node for node in _alive() if node["NodeID"] not in avoid]
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
        self._demand, self._avoid = demand, set(avoid)
        self._timeout, self._replacement_timeout = timeout, replacement_timeout
        self.node_ids: list[str] = []
        self.addresses: list[str] = []
        self._learn(self._table())

    def _table(self) -> dict[str, Any]:
        from ray.util.placement_group import placement_group_table

        return dict(placement_group_table(self.group))

    def _learn(self, table: Mapping[str, Any]) -> None:
        import ray

        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        self.node_ids = [table["bundles_to_node_id"][index] for index in range(self._demand.nnodes)]
        self.addresses = [addresses[node_id] for node_id in self.node_ids]

    def move_lost(self, silent: Collection[int], check: Callable[[], None]) -> list[int]:
        """See to it that all nodes of the job live: Ray places the bundles of lost ones anew, on other nodes.

        Args:
            silent: nodes of the job that did not answer: Ray, which needs a while to give a node up, is asked until it
                has, or they are found to live after all.
            check: called at every look; what it raises ends the wait.

        Returns:
            The indices of nodes that are others now.

        Raises:
            RunError: no other node was free in time.
        """
        began, patience = time.monotonic(), _VERDICT_SECONDS if silent else 0.0
        while not (lost := self._lost()) and time.monotonic() - began < patience:
            check()
            time.sleep(_LOOK_SECONDS)
        if not lost:
            return []
        log.warning("lost: %s; waiting for other nodes with what the job needs", lost)
        began = time.monotonic()
        while (table := self._table())["state"] != "CREATED" or self._lost(table["bundles_to_node_id"].values()):
            never = what_is_missing(self._demand, [n["Resources"] for n in _alive() if n["NodeID"] not in self._avoid])
            key = "replacement_timeout" if never else "placement_timeout"
            timeout = self._replacement_timeout if never else self._timeout
            if time.monotonic() - began >= timeout:
                raise RunError(
                    f"{lost} was lost, and no other node was free within {timeout:.0f} s (cluster.{key})"
                    + (f": {never}" if never else ""),
                    "the same command goes on from the newest checkpoint once the cluster has enough nodes again",
                )
            check()
            time.sleep(_LOOK_SECONDS)
        before = self.node_ids
        self._learn(table)  # more may have been lost meanwhile
        return [index for index, node_id in enumerate(before) if node_id != self.node_ids[index]]

    def _lost(self, node_ids: Iterable[str] | None = None) -> str:
        """Names of those of the nodes (default: the job's) that Ray has given up."""
        import ray

        alive = {node["NodeID"] for node in _alive()}
        hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
        wanted = self.node_ids if node_ids is None else node_ids
        return ", ".join(hosts.get(node_id, node_id) for node_id in wanted if node_id not in alive)

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
