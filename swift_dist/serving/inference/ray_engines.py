"""Engines of `infer` on the nodes of a Ray cluster: an actor each, which owns the server's process."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from swift_dist.errors import RunError
from swift_dist.serving.engines.process import EngineProcess
from swift_dist.serving.inference.replicas import Engines, engine_for
from swift_dist.serving.options import EngineOptions
from swift_dist.serving.sources.source import Source

log = logging.getLogger(__name__)

_ACTOR_SECONDS = 120.0  # to find a place on the cluster


def ray_replicas(
    options: EngineOptions, source: Source, count: int, address: str | None, stack: ExitStack
) -> Sequence[RayReplica]:
    """So many engines spread over a running cluster, which this process stays connected to until `stack` ends.

    Args:
        address: of the cluster (None: RAY_ADDRESS, else the one that runs on this machine).

    Raises:
        JobError: no cluster answers, or the engine cannot serve the source as asked.
    """
    from swift_dist.serving.engines.choose import uses_gpu
    from swift_dist.workers.ray_pool import connect

    stack.callback(connect(address))
    import ray

    use_gpu = uses_gpu(options, ray.cluster_resources().get("GPU", 0), "the cluster")
    engines = engine_for(options, source, use_gpu=use_gpu)
    devices = options.tensor_parallel_size * options.pipeline_parallel_size
    log.info("%s: %d engines of %s on the cluster", source.description, count, engines.engine.name)
    num_cpus, num_gpus = (1, devices) if use_gpu else (devices, 0)
    return [RayReplica(engines, number, num_cpus, num_gpus) for number in range(count)]


class _EngineActor:
    """An engine on a node of a cluster."""

    def __init__(self, engines: Engines, number: int) -> None:
        import ray

        folder = Path(tempfile.mkdtemp(prefix="swift-dist-infer-"))
        self._host = ray.util.get_node_ip_address()
        if not Path(engines.served.path).is_dir():
            raise RunError(f"node {self._host} does not see {engines.served.path}", "name storage that every node has")
        self._process = EngineProcess(engines.engine, engines.served, self._host, log=folder / f"engine_{number}.log")

    def start(self) -> str:
        self._process.start()
        return self._process.wait_ready().url

    def alive(self) -> bool:
        return self._process.alive

    def answers(self) -> bool:
        return self._process.healthy()

    def stop(self) -> None:
        self._process.stop(grace=5)
        shutil.rmtree(self._process.log.parent, ignore_errors=True)


class RayReplica:
    """An actor on a node of the connected cluster, which owns the server. Each `start` makes a new one."""

    is_ours = True

    def __init__(self, engines: Engines, number: int, num_cpus: float, num_gpus: int) -> None:
        self.name = f"the {engines.engine.name} engine {number} on the cluster"
        self._engines, self._number = engines, number
        self._resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        self._actor: Any = None
        self._stopped = self._is_placed = False

    def start(self) -> str:
        import ray

        self.end()
        if self._stopped:
            raise RunError(f"{self.name} was stopped")
        actor_class: Any = ray.remote(_EngineActor)
        options = {"max_concurrency": 4, "scheduling_strategy": "SPREAD", **self._resources}
        self._actor = actor_class.options(**options).remote(self._engines, self._number)
        waiting = self._actor.alive.remote()
        ready, _ = ray.wait([waiting], timeout=_ACTOR_SECONDS)
        if not ready:
            wanted = ", ".join(f"{count:g} {name[4:].upper()}s" for name, count in self._resources.items() if count)
            raise RunError(f"no node of the cluster has {wanted} free for {self.name}", "use fewer --replicas")
        self._is_placed = True
        try:
            return str(ray.get(self._actor.start.remote()))
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, RunError) else RunError(str(error))) from None
        except ray.exceptions.RayError as error:
            raise RunError(f"{self.name} was lost: {str(error).strip().splitlines()[0]}") from None

    def alive(self) -> bool:
        return self._asked("alive")

    def answers(self) -> bool:
        return self._asked("answers")

    def _asked(self, method: str) -> bool:
        import ray

        try:
            return bool(ray.get(getattr(self._actor, method).remote(), timeout=30))
        except ray.exceptions.RayError:
            return False

    def end(self) -> None:
        """End the actor and its server; `start` may make another."""
        import ray

        actor, self._actor = self._actor, None
        is_placed, self._is_placed = self._is_placed, False
        if actor is not None:
            with suppress(Exception):  # the actor, its node or the cluster may be gone
                if is_placed:
                    ray.get(actor.stop.remote(), timeout=20)
            with suppress(Exception):
                ray.kill(actor)

    def stop(self) -> None:
        self._stopped = True
        self.end()
