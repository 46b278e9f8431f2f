"""The numbers of a deployment in Prometheus' text format: replicas, losses, every engine's with labels, HAProxy's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

from swift_dist.serving.deployment.status import replica_states
from swift_dist.serving.front import runtime

if TYPE_CHECKING:
    from swift_dist.serving.deployment.controller import Controller

_ENGINE_SECONDS = 3.0


async def deployment_metrics(controller: Controller) -> str:
    """Text of ``/metrics``. An engine that does not answer within 3 s is left out, and the front while it does not."""
    import httpx

    seen = list(controller.registry.seen.values())
    async with httpx.AsyncClient(timeout=_ENGINE_SECONDS, trust_env=False) as client:
        answers = await asyncio.gather(*(client.get(s.url + "/metrics") for s in seen), return_exceptions=True)
    engines = [
        ({"replica": s.report.id, "version": s.report.version}, answer.text)
        for s, answer in zip(seen, answers, strict=True)
        if not isinstance(answer, BaseException) and answer.status_code == 200
    ]
    own = await asyncio.to_thread(_text, [*_own(controller), *relabelled(engines)])
    try:
        return own + await asyncio.to_thread(runtime.metrics, controller.folder.front)
    except (OSError, HTTPException):  # HTTPException: it ended in the middle of its answer
        return own


def _own(controller: Controller) -> list[Any]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily

    replicas = GaugeMetricFamily("swift_dist:replicas", "Replicas", labels=["model", "version", "state"])
    share = GaugeMetricFamily("swift_dist:version_share", "Share of the model's requests", labels=["model", "version"])
    lost = CounterMetricFamily("swift_dist:replicas_lost", "Replicas that died", labels=["version"])
    restarts = SummaryMetricFamily(
        "swift_dist:replica_restart_seconds", "From a replica's loss until another answers", labels=["version"]
    )
    for model in controller.models.values():
        for version in (v for v in (model.live, model.candidate) if v):
            states = replica_states(controller, version.id)
            for state, count in {"wanted": version.num_wanted, **states}.items():
                replicas.add_metric([model.name, version.id, state], count)
            share.add_metric([model.name, version.id], model.share_of(version))
    for name, losses in controller.registry.losses.items():
        lost.add_metric([name], len(losses.open) + len(losses.seconds))
        restarts.add_metric([name], len(losses.seconds), sum(losses.seconds))
    return [replicas, share, lost, restarts]


def relabelled(texts: Iterable[tuple[Mapping[str, str], str]]) -> list[Any]:
    """Metrics of several processes as one list, each family once: ``/metrics`` of each, and labels for its samples."""
    from prometheus_client.core import Metric
    from prometheus_client.parser import text_string_to_metric_families

    families: dict[str, Metric] = {}
    for labels, text in texts:
        for family in text_string_to_metric_families(text):
            held = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            held.samples += [s._replace(labels={**s.labels, **labels}) for s in family.samples]
    return list(families.values())


def _text(families: list[Any]) -> str:
    from prometheus_client import CollectorRegistry, generate_latest

    class Collected:
        def collect(self) -> list[Any]:
            return families

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collected())  # type: ignore[arg-type]
    return generate_latest(registry).decode()
