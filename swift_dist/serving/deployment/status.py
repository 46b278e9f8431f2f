"""What a deployment is doing, as JSON has it and as a person reads it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swift_dist.serving.deployment.controller import Controller
    from swift_dist.serving.deployment.desired import ModelState
    from swift_dist.serving.deployment.registry import Seen


def deployment_status(controller: Controller) -> dict[str, Any]:
    """Models with their versions, replicas, losses and how long it took to make them good, events."""
    losses = controller.registry.losses
    return {
        "ready": controller.is_ready(),
        "in_force": controller.is_in_force(),
        "stopping": controller.stopping,
        "models": [_model(model) for model in controller.models.values()],
        "replicas": [_shown(seen) for seen in controller.registry.seen.values()],
        "lost": {version: len(of.open) for version, of in losses.items() if of.open},
        "restart_seconds": {version: of.seconds for version, of in losses.items() if of.seconds},
        "logs": str(controller.folder.logs),
        "events": [{"time": event.time, "text": event.text} for event in controller.registry.events],
    }


def _model(model: ModelState) -> dict[str, Any]:
    versions = [version.model_dump() | {"share": model.share_of(version)} for version in model.versions]
    return model.model_dump() | {"versions": versions}


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


_SHOWN_EVENTS = 5


def render_status(status: dict[str, Any]) -> str:
    """What a person reads of `deployment_status`, with ``folder`` and ``address`` beside it."""
    state = "stopping" if status["stopping"] else "ready" if status["ready"] else "not ready"
    lines = [f"{status['folder']}  {status['address']}  {state}", f"logs: {status['logs']}"]
    for model in status["models"]:
        purpose = "embeddings" if model["task"] == "embed" else "text"
        adapters = f"  adapters: {', '.join(model['adapters'])}" if model["adapters"] else ""
        lines.append(f"{model['name']}  {purpose}{adapters}")
        for version in model["versions"]:
            lines += _version_lines(version, version["id"] == model["previous"], status)
    for event in status["events"][-_SHOWN_EVENTS:]:
        lines.append(f"{time.strftime('%H:%M:%S', time.localtime(event['time']))} {event['text']}")
    return "\n".join(lines)


def _version_lines(version: dict[str, Any], is_previous: bool, status: dict[str, Any]) -> Iterator[str]:
    replicas = [r for r in status["replicas"] if r["version"] == version["id"]]
    role = version["role"]
    if role == "retired" and not (is_previous or replicas):
        return
    share = f", {version['share']:.0%} of requests" if role == "candidate" else ""
    said = f"  ({version['message']})" if version["message"] else ""
    back = "  (--rollback returns to it)" if is_previous and role == "retired" else ""
    yield f"  {version['id']}  {role}{share}  {version['source']}{said}{back}"
    if role in ("live", "candidate"):
        ready = sum(r["state"] == "ready" for r in replicas)
        wanted = version["num_replicas"] if version["now"] is None else version["now"]
        coming = wanted - sum(r["state"] != "draining" for r in replicas)
        text = f"    {ready} of {version['num_replicas']} replicas ready"
        text += f", {coming} to come" if coming > 0 else ""
        if lost := status["lost"].get(version["id"]):
            text += f", {lost} lost and not replaced yet"
        if seconds := status["restart_seconds"].get(version["id"]):
            text += f", {len(seconds)} lost and replaced (the last after {seconds[-1]:.1f} s)"
        yield text
    for r in replicas:
        yield (
            f"    {r['host']}:{r['port']}  {r['state']}  {r['running']} running, {r['waiting']} waiting, "
            f"started in {r['start_seconds']} s"
        )
