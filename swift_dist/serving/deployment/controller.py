"""The actor that makes a deployment what it is to be: Serve applications, adapters, and what the front routes.

There is one per deployment. It keeps what is wanted in the deployment's folder, so when it is killed Ray starts it
again and it takes over what runs: replicas report to it twice a second. Its loop compares what is wanted with what is
there; every decision in it is a function of `desired` or `scaling`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

from swift_dist.serving.deployment import desired, scaling
from swift_dist.serving.deployment.adapters import Adapters
from swift_dist.serving.deployment.apps import Applications
from swift_dist.serving.deployment.desired import ModelState, Refused
from swift_dist.serving.deployment.folder import DeploymentFolder
from swift_dist.serving.deployment.registry import Registry
from swift_dist.serving.deployment.replica import NAMESPACE, ReplicaSpec, Report
from swift_dist.serving.deployment.spec import DeploymentSpec
from swift_dist.serving.engines.choose import find_engine
from swift_dist.serving.front.state import FrontState

_LOOP_SECONDS = 0.5
_ADOPT_SECONDS = 3.0  # after a restart: until every replica has reported
_APPLY_SECONDS = 15.0  # for the front to take a new state

log = logging.getLogger(__name__)


class Controller:
    """See the module. All methods run on the actor's event loop."""

    def __init__(self, spec: DeploymentSpec) -> None:
        self.spec = spec
        self.folder = DeploymentFolder(spec.folder)
        self.models: dict[str, ModelState] = {}
        self.registry = Registry(self._notify, self.wake)
        self.control_port = 0
        self.began_at = int(time.time())
        self.control_task: asyncio.Task[None] | None = None
        self.engine = find_engine(spec.engine)
        self.adapters = Adapters(self)
        self.apps = Applications(spec.name)
        self.stopping = False
        self._apps: dict[str, int] = {}  # what Serve was told
        self._wishes: dict[str, scaling.Wish] = {}
        self._start_failures: dict[str, str] = {}
        self._state: FrontState | None = None
        self._generation, self._applied = 0, 0
        self._changed = asyncio.Event()
        self._wake, self._writing = asyncio.Event(), asyncio.Lock()  # writing: the newest state is the last
        self._began: asyncio.Future[None] | None = None
        self._adopted_at = 0.0
        self._task: asyncio.Task[None] | None = None

    # ---- start

    async def begin(self) -> int:
        """Start, or take over what runs. Idempotent; every call of the driver begins with it.

        Returns:
            The control API's port on 127.0.0.1.
        """
        if self._began is None:
            self._began = asyncio.get_running_loop().create_future()
            try:
                await self._begin()
                self._began.set_result(None)
            except BaseException as error:
                self._began.set_exception(error)
        await self._began
        return self.control_port

    async def _begin(self) -> None:
        from swift_dist.serving.deployment.control import serve_control

        known = self.folder.read_state()
        if known is None:
            for name, (source, path, adapters) in self.spec.first.items():
                model = ModelState(name=name, task=self.spec.task(name), adapters=adapters)
                self.models[name] = desired.propose(model, source, path, self.spec.num_replicas)
            self.folder.write_state(list(self.models.values()))
        else:
            self.models = {model.name: model for model in known}
            self._apps = dict.fromkeys(await asyncio.to_thread(self.apps.running), -1)  # how many is not known
            self._adopted_at = time.monotonic()
            self.tell("the controller was restarted and goes on")
        earlier = self.folder.read().get("control_port") if self.folder.exists() else None
        self.control_port = await serve_control(self, earlier)
        self.folder.write(control_port=self.control_port, control=f"http://127.0.0.1:{self.control_port}")
        self._task = asyncio.create_task(self._run())

    # ---- what replicas say

    async def adapters_of(self, version: str) -> dict[str, str]:
        """What a replica that starts is to load."""
        await self.begin()
        model = self._model_of(version)
        return dict(model.adapters) if model else {}

    async def report(self, report: Report) -> None:
        """A replica is alive."""
        await self.begin()
        self.registry.report(report)

    async def lost(self, replica_id: str, reason: str) -> None:
        """A replica is about to end itself."""
        self.registry.lose(replica_id, reason)

    async def draining(self, replica_id: str) -> None:
        """A replica is about to stop. Returns once the front sends it nothing more."""
        seen = self.registry.seen.get(replica_id)
        if seen and not self.stopping:
            seen.is_draining = True
            await self.publish()

    async def gone(self, replica_id: str) -> None:
        """A replica has stopped in order."""
        self.registry.forget(replica_id)

    async def start_failed(self, replica_id: str, version: str, message: str) -> None:
        """A replica could not start; Serve tries once more before it gives the version up."""
        self._start_failures[version] = message
        self.tell(f"{version}: a replica did not start: {message}")
        self.wake()

    # ---- what the driver asks

    async def follow(self, applied: int, event: int) -> dict[str, Any]:
        """What is new for the driver, within a second: the front's state and events.

        Args:
            applied: generation of the state that the front has.
            event: number of the last event that was printed.
        """
        await self.begin()
        if applied > self._applied:
            self._applied = applied
            self._note_routed()
            self._notify()
        if self._generation == applied and not self.stopping and not self.registry.events_after(event):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 1.0)
        return {
            "generation": self._generation,
            "state": self._state if self._generation != applied else None,
            "events": self.registry.events_after(event),
            "ready": self.is_ready(),
            "failed": self._first_failure(),
            "stopping": self.stopping,
        }

    def _note_routed(self) -> None:
        if self._state is None or self._applied != self._generation:
            return
        versions = [version for route in self._state.routes for version in route.versions]
        self.registry.note_routed(replica.id for version in versions for replica in version.replicas)

    def is_ready(self) -> bool:
        """Whether every model has its replicas, and the front sends requests to them; a canary its share."""
        return all(desired.is_settled(model) for model in self.models.values()) and self.is_in_force()

    def is_in_force(self) -> bool:
        """Whether the front routes what is there now."""
        return self._front_state() == self._state and self._applied == self._generation

    def _first_failure(self) -> str | None:
        """Why a model that never was live cannot be."""
        for model in self.models.values():
            failed = [v for v in model.versions if v.role == "failed"]
            if failed and not model.live and not model.candidate:
                return f"{model.name} cannot be served: {failed[-1].message}"
        return None

    def tell(self, text: str) -> None:
        """Note an event."""
        log.info("%s", text)
        self.registry.tell(text)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def wake(self) -> None:
        """Look again now."""
        self._wake.set()

    # ---- what people ask (control.py)

    def model(self, name: str | None) -> ModelState:
        """A model by its name; the only one where no name is given.

        Raises:
            Refused: there is none of that name, or several and no name.
        """
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name is None:
            raise Refused(f"several models: --served_model_name (over HTTP: model) is one of {', '.join(self.models)}")
        if name not in self.models:
            raise Refused(f"no model is called {name!r}: there are {', '.join(self.models)}")
        return self.models[name]

    async def change(self, model: ModelState) -> ModelState:
        """Make a model what `desired` has made of it."""
        self.models[model.name] = model
        async with self._writing:
            await asyncio.to_thread(self.folder.write_state, list(self.models.values()))
        self.wake()
        return model

    async def update(self, name: str | None, source: str, path: str, share: float, surge: int | None) -> ModelState:
        """Begin to replace a model's version.

        Raises:
            Refused: another update is under way, or the cluster has no room for it.
        """

        def propose() -> ModelState:
            model = self.model(name)
            live = model.live.num_replicas if model.live else self.spec.num_replicas
            num_replicas = live if share >= 1 else desired.canary_replicas(live, share)
            return desired.propose(model, source, path, num_replicas, share, surge)

        await self._require_room(self.model(name), propose())
        proposed = propose()  # again: the model may have changed meanwhile
        assert proposed.candidate
        self.tell(f"{proposed.candidate.id} starts from {source}")
        return await self.change(proposed)

    async def promote(self, name: str | None, surge: int | None = None) -> ModelState:
        """All requests to the canary."""
        await self._require_room(self.model(name), desired.promote(self.model(name), surge))
        model = desired.promote(self.model(name), surge)  # again: it may have changed meanwhile
        assert model.candidate
        self.tell(f"{model.candidate.id} is promoted")
        return await self.change(model)

    async def rollback(self, name: str | None, surge: int | None = None) -> ModelState:
        """Back to the version before."""
        await self._require_room(self.model(name), desired.rollback(self.model(name), surge))
        before = self.model(name)
        model = desired.rollback(before, surge)  # again: it may have changed meanwhile
        if model.candidate:
            self._start_failures.pop(model.candidate.id, None)
            self.adapters.forget_refusal(model.candidate.id)
            self.tell(f"{model.candidate.id} starts again")
        elif before.candidate:
            self.tell(f"{before.candidate.id} is rolled back")
        return await self.change(model)

    async def _require_room(self, before: ModelState, after: ModelState) -> None:
        """For the replicas of both versions, which run at once for a while."""
        more = sum(desired.wanted([after]).values()) - sum(desired.wanted([before]).values())
        if more <= 0 or (not self.spec.shares_cluster and not self.spec.num_gpus):
            return  # the own cluster's CPUs are counted for it
        from swift_dist.serving.deployment.resources import free_replicas

        free = await asyncio.to_thread(free_replicas, self.spec.num_cpus, self.spec.num_gpus)
        if free < more:
            raise Refused(
                f"the new version needs {more} replicas beside the old ones, and the cluster has room for {free}: give "
                f"it more nodes, or --surge {free} to replace a few at a time"
            )

    async def stop(self) -> None:
        """The driver is to end the deployment."""
        self.stopping = True
        self._notify()

    # ---- the loop

    async def _run(self) -> None:
        while not self.stopping:
            try:
                await self._reconcile()
            except Exception:
                log.exception("a turn of the controller failed")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _LOOP_SECONDS)
            self._wake.clear()

    async def _reconcile(self) -> None:
        """One turn. Applications that are wanted start before, those that are not end after the front has changed."""
        await self.registry.look_for_lost()
        self.adapters.reconcile()
        ready = {version: len(replicas) for version, replicas in self.registry.ready().items()}
        for model in list(self.models.values()):
            settled = await self._give_up(desired.settle(model, ready))
            settled = self._scaled(settled)
            if settled != model and self.models[model.name] == model:
                for change in desired.changes(model, settled):
                    self.tell(change)
                await self.change(settled)
        await self._apply(desired.wanted(list(self.models.values())))
        await self.publish()
        for version in list(self._apps):
            if version not in desired.wanted(list(self.models.values())):  # now: a rollback may have come meanwhile
                await asyncio.to_thread(self.apps.delete, version)
                del self._apps[version]

    async def _apply(self, wanted: dict[str, int]) -> None:
        """Tell Serve."""
        for version, num_replicas in wanted.items():
            told = self._apps.get(version)
            if told is None:
                spec = self._replica_spec(version)
                await asyncio.to_thread(self.apps.run, spec, num_replicas, self.spec.num_cpus, self.spec.num_gpus)
            elif told != num_replicas:
                await asyncio.to_thread(self.apps.scale, version, num_replicas)
            self._apps[version] = num_replicas

    def _replica_spec(self, version: str) -> ReplicaSpec:
        model = self._model_of(version)
        state = model.version(version) if model else None
        assert model and state
        return ReplicaSpec(
            version=version,
            application=self.apps.name(version),
            name=model.name,
            path=state.path,
            options=self.spec.options[model.name],
            engine=self.spec.engine,
            controller=self.spec.name,
            use_gpu=self.spec.num_gpus > 0,
            loopback=self.spec.loopback,
            logs=str(self.folder.logs),
            drain_seconds=self.spec.drain_seconds,
        )

    def _model_of(self, version: str) -> ModelState | None:
        return next((m for m in self.models.values() if m.version(version)), None)

    async def _give_up(self, model: ModelState) -> ModelState:
        """A candidate that Serve has given up, or that cannot take an adapter, has failed."""
        candidate = model.candidate
        if candidate is None or candidate.share > 0:
            return model
        message = self.adapters.refusal(candidate.id)
        if message is None and candidate.id in self._apps:
            message = await asyncio.to_thread(self.apps.failure, candidate.id)
            message = message and self._start_failures.get(candidate.id, message)
        return desired.fail(model, candidate.id, message) if message else model

    def _scaled(self, model: ModelState) -> ModelState:
        """By load, where that is asked for."""
        live, bounds = model.live, self.spec.bounds
        if live is None or bounds is None or live.now is not None:  # (that one is being replaced)
            return model
        wish = self._wishes.get(live.id, scaling.Wish())
        number, self._wishes[live.id] = scaling.decide(
            live.num_replicas, self.registry.load(live.id), time.monotonic(), wish, bounds, self.spec.scale
        )
        return desired.resize(model, live.id, number) if number != live.num_replicas else model

    # ---- the front

    async def publish(self) -> None:
        """Have the front route what is there. Returns once it does."""
        if time.monotonic() - self._adopted_at < _ADOPT_SECONDS and self._adopted_at:
            return  # the front knows more than we do yet
        state = self._front_state()
        if state != self._state:
            self._state = state
            self._generation = max(int(time.time() * 1000), self._generation + 1)
            self._notify()
        await self._front_has(self._generation)

    def _front_state(self) -> FrontState:
        ready = self.registry.ready()
        routes = tuple(desired.route(model, ready) for model in self.models.values())
        return FrontState(routes, ("127.0.0.1", self.control_port))

    async def _front_has(self, generation: int) -> None:
        deadline = time.monotonic() + _APPLY_SECONDS
        while self._applied < generation and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 0.5)
        if self._applied < generation:
            log.warning("the front has not taken its new state within %.0f s", _APPLY_SECONDS)


def start_controller(spec: DeploymentSpec) -> Any:
    """The actor, on this process's node; it is restarted when it is killed, and ends with this process."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    actor: Any = ray.remote(Controller)
    return actor.options(
        name=spec.name,
        namespace=NAMESPACE,
        num_cpus=0,
        max_restarts=-1,
        max_concurrency=1000,
        scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
    ).remote(spec)
