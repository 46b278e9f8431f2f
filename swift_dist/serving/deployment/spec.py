"""What a deployment was started as: what its controller is told, and what does not change while it runs."""

from __future__ import annotations

from dataclasses import dataclass

from swift_dist.serving.deployment.scaling import Bounds, ScaleOptions
from swift_dist.serving.options import EngineOptions
from swift_dist.serving.sources.source import Task


@dataclass(frozen=True)
class DeploymentSpec:
    """What does not change while a deployment runs.

    Attributes:
        name: of the controller, unique in the cluster.
        folder: of the deployment.
        options: model -> its engine's keys. engine: of every model.
        num_cpus, num_gpus: of a replica.
        loopback: whether replicas listen on 127.0.0.1.
        drain_seconds: for running requests, when a replica is taken away.
        bounds, scale: of autoscaling, where it is on.
        adapter_roots: folders below which adapters may be loaded from.
        first: model -> (what the user named, Hugging Face folder, adapters).
        num_replicas: at the start.
        admin_keys: file of keys that may load adapters, beside the deployment's own token.
        shares_cluster: whether the cluster runs other things, too.
    """

    name: str
    folder: str
    options: dict[str, EngineOptions]
    engine: str
    num_cpus: float
    num_gpus: int
    loopback: bool
    drain_seconds: float
    bounds: Bounds | None
    scale: ScaleOptions
    adapter_roots: tuple[str, ...]
    first: dict[str, tuple[str, str, dict[str, str]]]
    num_replicas: int
    shares_cluster: bool
    admin_keys: str | None = None

    def task(self, model: str) -> Task:
        """What a model is for."""
        return "embed" if self.options[model].task == "embed" else "generate"
