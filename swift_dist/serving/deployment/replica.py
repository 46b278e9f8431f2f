"""A replica: an actor that Ray Serve places and replaces, and the engine's process below it.

No request passes through here: the front sends them to the engine's own port. The actor starts the engine, says twice a
second how it is (`report`), ends itself when the engine has ended, and before it is stopped has the front forget it and
waits for the requests that run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from swift_dist.errors import RunError
from swift_dist.serving.engines.base import Load
from swift_dist.serving.engines.choose import find_engine
from swift_dist.serving.engines.process import EngineProcess
from swift_dist.serving.options import EngineOptions, ServedModel

NAMESPACE = "swift_dist"  # of controllers
REPORT_SECONDS = 0.5
_ORPHAN_SECONDS = 30.0  # without a controller: the deployment is over
_SILENT_SECONDS = 30.0  # an engine that answers nothing for so long is replaced

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReplicaSpec:
    """What every replica of a version is told.

    Attributes:
        version: its id. application: the name of its Serve application.
        name, path, options, engine: what is served, how, by which engine.
        controller: the controller's name.
        use_gpu: whether the replica was given GPUs.
        loopback: listen on 127.0.0.1, as everything is on one machine; else on the node's address.
        logs: folder of the engines' logs.
        drain_seconds: how long running requests may take to end.
    """

    version: str
    application: str
    name: str
    path: str
    options: EngineOptions
    engine: str
    controller: str
    use_gpu: bool
    loopback: bool
    logs: str
    drain_seconds: float


@dataclass(frozen=True)
class Report:
    """A ready replica, as the controller hears of it.

    Attributes:
        id: Serve's name of the actor, unique; version: the version's id.
        host, port: of the engine. node: Ray's id of the node.
        pids: the actor's and the engine's.
        load: what the engine does.
        start_seconds: from the actor's start to readiness.
        ready_at: wall clock.
    """

    id: str
    version: str
    host: str
    port: int
    node: str
    pids: tuple[int, ...]
    load: Load
    start_seconds: float
    ready_at: float
    adapters: dict[str, str] = field(default_factory=dict)


def find_controller(name: str) -> Any:
    """The controller's handle.

    Raises:
        ValueError: there is none (any more).
    """
    import ray

    return ray.get_actor(name, namespace=NAMESPACE)


class EngineReplica:
    """The class that Ray Serve runs. Serve calls `__init__`, `check_health` and, before the end, `__del__`."""

    async def __init__(self, spec: ReplicaSpec) -> None:  # type: ignore[misc]  # Serve awaits it
        import ray
        from ray import serve

        self._spec, self._started = spec, time.time()
        self._process: EngineProcess | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ending = False
        self._load, self._answered = Load(0, 0), time.monotonic()
        self._controller = find_controller(spec.controller)
        context = serve.get_replica_context()
        self.id = context.replica_id.to_full_id_str()
        if spec.loopback:
            _keep_to_loopback()
        try:
            self._adapters = await self._controller.adapters_of.remote(spec.version)
            host = "127.0.0.1" if spec.loopback else ray.util.get_node_ip_address()
            file = Path(spec.logs) / f"{spec.version}.{self.id.rpartition('#')[2]}.log"
            self._process = EngineProcess(find_engine(spec.engine), self._served(), host, log=file)
            await asyncio.to_thread(self._start)
        except RunError as error:
            await self._controller.start_failed.remote(self.id, spec.version, str(error))
            raise
        self._report = Report(
            id=self.id,
            version=spec.version,
            host=host,
            port=self._process.port,
            node=ray.get_runtime_context().get_node_id(),
            pids=(os.getpid(), self._process.pid or 0),
            load=self._load,
            start_seconds=time.time() - self._started,
            ready_at=time.time(),
            adapters=self._adapters,
        )
        self._answered = time.monotonic()
        self._tasks = [asyncio.create_task(self._end_with_engine()), asyncio.create_task(self._keep_reporting())]

    def _served(self) -> ServedModel:
        spec = self._spec
        missing = [p for p in (spec.path, *self._adapters.values()) if not Path(p).exists()]
        if missing:
            raise RunError(
                f"node {os.uname().nodename} does not see {missing[0]}", "name a folder on storage that every node has"
            )
        return ServedModel(spec.name, spec.path, spec.options, dict(self._adapters), spec.use_gpu)

    def _start(self) -> None:
        assert self._process
        self._process.start()
        self._process.wait_ready()

    async def _end_with_engine(self) -> None:
        """Serve would notice at its next check of health; this is quicker."""
        assert self._process
        while self._process.alive:
            await asyncio.sleep(0.05)
        await self._end(f"its engine ended ({self._process.exit_code})")

    async def _keep_reporting(self) -> None:
        """Until the actor ends."""
        assert self._process
        heard = time.monotonic()  # the controller
        while not self._ending:
            try:
                self._load = await asyncio.to_thread(self._process.load)
                self._answered = time.monotonic()
            except RunError as error:
                log.warning("%s", error)
                if time.monotonic() - self._answered > _SILENT_SECONDS:
                    await self._end(f"its engine has not answered for {_SILENT_SECONDS:.0f} s")
            else:
                if await self._tell(replace(self._report, load=self._load)):
                    heard = time.monotonic()
                elif time.monotonic() - heard > _ORPHAN_SECONDS:
                    await self._end_deployment()
            await asyncio.sleep(REPORT_SECONDS)

    async def _tell(self, report: Report) -> bool:
        """Report; whether the controller took it."""
        from ray.exceptions import RayError

        try:
            await asyncio.wait_for(_awaited(self._controller.report.remote(report)), 5.0)
        except (RayError, TimeoutError):
            with contextlib.suppress(ValueError):
                self._controller = find_controller(self._spec.controller)
            return False
        return True

    async def _end(self, reason: str) -> None:
        """End this actor at once, so that Serve replaces it."""
        if self._ending:
            return
        self._ending = True
        with contextlib.suppress(Exception):
            await asyncio.wait_for(_awaited(self._controller.lost.remote(self.id, reason)), 2.0)
        if self._process:
            await asyncio.to_thread(self._process.stop, 0.0)
        os._exit(1)

    async def _end_deployment(self) -> None:
        """The driver was killed on a cluster that goes on: Serve would keep this application for ever."""
        from ray import serve

        log.error("%s has no controller any more: its application is deleted", self.id)
        await asyncio.to_thread(serve.delete, self._spec.application, _blocking=False)
        await self._end("its deployment is over")

    async def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        if self._process is None or not self._process.alive:
            raise RunError(f"the engine of {self.id} has ended", "")
        if time.monotonic() - self._answered > _SILENT_SECONDS:
            raise RunError(f"the engine of {self.id} does not answer", "")

    async def __del__(self) -> None:  # type: ignore[misc]  # Serve awaits it
        """The front forgets this replica, running requests end, the engine ends."""
        process = getattr(self, "_process", None)  # the constructor may have failed before it
        if process is None or self._ending:
            return
        self._ending = True
        deadline = time.monotonic() + self._spec.drain_seconds
        with contextlib.suppress(Exception):
            await asyncio.wait_for(_awaited(self._controller.draining.remote(self.id)), 10.0)
        await drained(process, deadline)
        await asyncio.to_thread(process.stop, 5.0)
        with contextlib.suppress(Exception):
            await asyncio.wait_for(_awaited(self._controller.gone.remote(self.id)), 2.0)


async def drained(process: EngineProcess, deadline: float) -> None:
    """Returns once an engine that gets no more requests has answered those it had, or at `deadline`.

    It must have been idle for longer than its gauges may be old.
    """
    idle_since: float | None = None
    while process.alive and (now := time.monotonic()) < deadline:
        try:
            load = await asyncio.to_thread(process.load)
        except RunError:
            return
        if load.running + load.waiting:
            idle_since = None
        elif idle_since is None:
            idle_since = now
        elif now - idle_since > process.engine.gauge_seconds:
            return
        await asyncio.sleep(0.1)


async def _awaited(reference: Any) -> Any:
    """Ray's reference as a coroutine, which asyncio.wait_for wants."""
    return await reference


def _keep_to_loopback() -> None:
    """Serve's server for calls between deployments, of which there are none, would listen on every interface."""
    from ray.serve._private import replica

    listen = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: listen(server, address.replace("[::]", "127.0.0.1"))
