"""Whether a Ray cluster can ever hold a job: its ranks, and what is kept for its driver beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swift_dist.errors import JobError

if TYPE_CHECKING:
    from swift_dist.cluster.placement import Demand
    from swift_dist.launchers._base import Work


def require_room(work: Work, nodes: list[dict[str, float]]) -> None:
    """Refuse what nodes with these total resources can never hold, all at once: the ranks and the driver.

    A deployment has no ranks, and finds out itself whether its replicas have room.

    Raises:
        JobError: saying what is missing. (Ray itself would leave the job PENDING for ever.)
    """
    from swift_dist.cluster.placement import what_is_missing

    demand = None if work.is_service else _placeable(work, nodes)
    options = work.launch.ray
    kept = {
        "CPU": options.entrypoint_num_cpus,
        "GPU": options.entrypoint_num_gpus,
        "memory": float(options.entrypoint_memory),
        **options.entrypoint_resources,
    }
    kept = {name: amount for name, amount in kept.items() if amount}
    hosts = [i for i, node in enumerate(nodes) if all(node.get(name, 0) >= amount for name, amount in kept.items())]
    if not kept or (demand is None and hosts):
        return
    if demand and any(what_is_missing(demand, _without(nodes, i, kept)) is None for i in hosts):
        return
    asked = ", ".join(f"{amount:g} {name}" for name, amount in kept.items())
    key = next(name for name, value in options if name.startswith("entrypoint_") and value)
    if not hosts:
        raise JobError(f"launch.ray.{key}", f"no node of the cluster has {asked}", "ask for less")
    raise JobError(
        f"launch.ray.{key}",
        f"with {asked} kept for the driver there is no room for {demand}",
        "ask for less",
    )


def _placeable(work: Work, nodes: list[dict[str, float]]) -> Demand:
    """What the ranks ask of the nodes, which have it."""
    from swift_dist.cluster.devices import choose_devices, gpus_per_node
    from swift_dist.cluster.placement import Demand, require_placeable

    devices = choose_devices(work.cluster, gpus_per_node(nodes, work.cluster.nnodes), "a node of the cluster")
    demand = Demand.of(work.cluster, devices.nproc_per_node, devices.use_gpu)
    require_placeable(demand, nodes)
    return demand


def _without(nodes: list[dict[str, float]], index: int, kept: dict[str, float]) -> list[dict[str, float]]:
    changed = {name: amount - kept.get(name, 0) for name, amount in nodes[index].items()}
    return [changed if i == index else node for i, node in enumerate(nodes)]
