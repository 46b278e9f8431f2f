"""What a deployment is doing, as JSON has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swift_dist.serving.deployment.controller import Controller
    from swift_dist.serving.deployment.registry import Seen


def deployment_status(controller: Controller) -> dict[str, Any]:
    """Models with their versions, replicas, losses and how long it took to make them good, events."""
    losses = controller.registry.losses
    return {
        "ready": controller.is_ready(),
        "in_force": controller.is_in_force(),
        "stopping": controller.stopping,
        "models": [model.model_dump() for model in controller.models.values()],
        "replicas": [_shown(seen) for seen in controller.registry.seen.values()],
        "lost": {version: len(of.open) for version, of in losses.items() if of.open},
        "restart_seconds": {version: of.seconds for version, of in losses.items() if of.seconds},
        "events": [{"time": event.time, "text": event.text} for event in controller.registry.events],
    }


def ready_replicas(controller: Controller) -> dict[str, int]:
    """Model -> replicas that answer."""
    ready = controller.registry.ready()
    return {m.name: sum(len(ready.get(v.id, ())) for v in m.versions) for m in controller.models.values()}


def replica_states(controller: Controller, version: str) -> dict[str, int]:
    """How many of a version's replicas are ready, starting (the front does not know them yet), draining."""
    states = {"ready": 0, "starting": 0, "draining": 0}
    for seen in controller.registry.seen.values():
        if seen.report.version == version:
            states[_state(seen)] += 1
    return states


def _state(seen: Seen) -> str:
    return "draining" if seen.is_draining else "ready" if seen.is_routed else "starting"


def _shown(seen: Seen) -> dict[str, Any]:
    report = seen.report
    return {
        "id": report.id,
        "version": report.version,
        "state": _state(seen),
        "host": report.host,
        "port": report.port,
        "node": report.node,
        "pids": list(report.pids),
        "running": report.load.running,
        "waiting": report.load.waiting,
        "adapters": sorted(seen.adapters or ()),
        "start_seconds": round(report.start_seconds, 2),
        "ready_at": report.ready_at,
    }
