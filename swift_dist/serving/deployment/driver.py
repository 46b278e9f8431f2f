"""A deployment from its start to its end: the process in the foreground, which owns the front and the Ray cluster.

The controller decides what is routed; this process has the front do it, says what happens, and ends everything in
order: first the front, which answers what runs, then the replicas, then the cluster.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from swift_dist.config.section import part_of
from swift_dist.errors import JobError, RunError
from swift_dist.serving.deployment.plan import SURGE, Plan, check_models
from swift_dist.serving.front.options import url_of
from swift_dist.serving.front.state import FrontState
from swift_dist.serving.options import EngineOptions

log = logging.getLogger(__name__)

_CONTROLLER_SECONDS = 60.0  # without a word from it
_AGAIN_SECONDS = 0.5  # after the front refused


def serve(plan: Plan) -> dict[str, Any]:
    """Serve until SIGINT, SIGTERM or `--stop`.

    Raises:
        JobError: the cluster has no room, or nothing answers at its address.
        RunError: a model does not start, or something that it needs is lost for good.
    """
    from swift_dist.cluster.devices import Devices, gpus_of_this_machine
    from swift_dist.cluster.runtime import Cluster
    from swift_dist.cluster.versions import check_versions
    from swift_dist.config.job import ClusterSection

    check_versions(os.environ)
    num_cpus = plan.num_cpus * (SURGE * plan.most_replicas * len(plan.models) + 1)
    gpus = gpus_of_this_machine() if plan.use_gpu and plan.is_own else 0
    with ExitStack() as stack:
        cluster = stack.enter_context(
            Cluster(ClusterSection(address=plan.address, cpus_per_rank=num_cpus / max(gpus, 1)))
        )
        cluster.start(Devices(gpus > 0, max(gpus, 1)))
        cluster.connect()
        if not plan.is_own:
            plan = _on_cluster(plan)
        stop = stack.enter_context(_stop_signals())
        plan.folder.claim()
        plan.folder.make_token()
        plan.folder.forget_state()
        return _Deployment(plan, stop).run()


def _on_cluster(plan: Plan) -> Plan:
    """The plan on a cluster that runs: with its GPUs where it has some.

    Raises:
        JobError: the engine cannot serve there, or the cluster is too small.
    """
    import ray

    from swift_dist.serving.deployment.resources import most_replicas
    from swift_dist.serving.engines.choose import choose, uses_gpu

    use_gpu = uses_gpu(plan.options, ray.cluster_resources().get("GPU", 0), f"the cluster at {plan.address}")
    devices = plan.options.tensor_parallel_size * plan.options.pipeline_parallel_size
    engine = choose(part_of(plan.options, EngineOptions), use_gpu)
    plan = replace(plan, engine=engine, use_gpu=use_gpu, num_gpus=devices if use_gpu else 0)
    check_models(plan)
    wanted = plan.most_replicas * len(plan.models)
    room = most_replicas(plan.num_cpus, plan.num_gpus)
    if room < wanted:
        each = f"{plan.num_gpus} GPUs and " if plan.num_gpus else ""
        raise JobError(
            "autoscale" if plan.bounds else "replicas",
            f"the cluster at {plan.address} has room for {room} replicas of {each}{plan.num_cpus:g} CPUs, not {wanted}",
            "fewer replicas, or a smaller --cpus_per_replica",
        )
    return plan


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second one interrupts at once."""
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt("ended without waiting for running requests")
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Deployment:
    """Controller, front and what happens between them."""

    def __init__(self, plan: Plan, stop: threading.Event) -> None:
        self._plan, self._stop = plan, stop
        self._spec = plan.spec()
        self._folder = plan.folder
        self._applied, self._event = 0, 0
        self._ready = False
        self._failure: str | None = None
        self._started = time.time()

    def run(self) -> dict[str, Any]:
        import ray

        from swift_dist.serving.deployment.apps import start_serve
        from swift_dist.serving.deployment.controller import start_controller
        from swift_dist.serving.deployment.in_use import FoldersInUse
        from swift_dist.serving.front.haproxy import Front

        self._write("starting")
        self._front = Front(self._folder.front, self._plan.front_options())
        self._front_runs = False
        starts_serve = start_serve()
        self._controller = start_controller(self._spec)
        try:
            ray.get(self._controller.begin.remote())
            log.info("serving %s; logs in %s", ", ".join(m.name for m in self._plan.models), self._folder.logs)
            first = [folder for model in self._plan.models for folder in (model.path, *model.adapters.values())]
            with FoldersInUse(self._folder, first), self._following():
                self._loop()
        finally:
            self._end(starts_serve)
        if self._failure:
            raise RunError(self._failure, f"the engines' logs are in {self._folder.logs}")
        return {
            "state": "stopped",
            "folder": str(self._folder.path),
            "seconds": round(time.time() - self._started, 1),
            "message": f"stopped; {self._folder.path}",
        }

    @property
    def _address(self) -> str:
        return f"{url_of(self._plan.options)}/v1"

    def _write(self, state: str) -> None:
        self._folder.write(
            state=state,
            pid=os.getpid(),
            host=socket.gethostname(),
            started=self._started,
            address=self._address,
            controller=self._spec.name,
            engine=self._plan.engine.name,
            use_gpu=self._plan.use_gpu,
            options=self._plan.options.model_dump(mode="json"),
            engine_options={name: keys.model_dump(mode="json") for name, keys in self._spec.options.items()},
        )

    @contextmanager
    def _following(self) -> Iterator[None]:
        """`--follow`: new checkpoints are deployed while the block runs."""
        if not self._plan.options.follow:
            yield
            return
        from swift_dist.serving.deployment.follow import Follower

        with Follower(self._plan, self._folder):
            yield

    def _loop(self) -> None:
        import ray
        from ray.exceptions import RayError

        heard = time.monotonic()
        while not self._stop.is_set():
            try:
                news = ray.get(self._controller.follow.remote(self._applied, self._event), timeout=30.0)
            except (RayError, TimeoutError) as error:
                if time.monotonic() - heard > _CONTROLLER_SECONDS:
                    raise RunError(f"the controller does not answer: {error}", "") from error
                time.sleep(0.1)
                continue
            finally:
                self._keep_front()
            heard = time.monotonic()
            if not self._take(news):
                return

    def _keep_front(self) -> None:
        try:
            if self._front_runs and self._front.ensure():
                log.warning("the front was restarted")
        except RunError as error:  # such as a port that is taken for a moment: the next turn tries again
            log.warning("the front has ended and does not start again yet: %s", error)
            time.sleep(_AGAIN_SECONDS)

    def _take(self, news: dict[str, Any]) -> bool:
        """Act on what the controller says; whether to go on."""
        for event in news["events"]:
            log.info("%s %s", time.strftime("%H:%M:%S", time.localtime(event.time)), event.text)
            self._event = event.number
        if news["failed"]:
            self._failure = news["failed"]
            return False
        if news["state"] is not None and self._route(news["state"]):
            self._applied = news["generation"]
        if news["ready"] and not self._ready:
            self._ready = True
            self._say_ready()
        return not news["stopping"]

    def _route(self, state: FrontState) -> bool:
        """Whether the front routes by `state` now. Where it does not the controller will say it again."""
        if not self._front_runs:
            self._front.start(state)
            self._front_runs = True
            return True
        try:
            self._front.update(state)
        except (RunError, ValueError) as error:
            log.warning("the front does not take its new state yet: %s", error)
            time.sleep(_AGAIN_SECONDS)
            return False
        return True

    def _say_ready(self) -> None:
        first = min(self._plan.models, key=lambda m: m.options.task == "embed")  # one of text where there is one
        ask = "embeddings.create(model=%r, input=[...])"
        ask = ask if first.options.task == "embed" else "chat.completions.create(model=%r, messages=[...])"
        names = [n for m in self._plan.models for n in (m.name, *m.adapters)]
        self._folder.write(state="ready")
        log.info(
            f"ready after %.1f s: %s  models: %s  try: OpenAI(base_url=%r, api_key=%s).{ask}",
            time.time() - self._started,
            self._address,
            ", ".join(names),
            self._address,
            "..." if self._plan.options.api_keys or self._plan.options.api_keys_variable else "'none'",
            first.name,
        )

    def _end(self, starts_serve: bool) -> None:
        """The front drains, then everything else goes. On a cluster of others only what is ours."""
        import ray

        self._folder.write(state="stopping")
        try:
            if self._front_runs:
                log.info("stopping: requests that run are answered first")
                self._front.stop(self._plan.options.drain)
            if not self._plan.is_own:
                self._delete_applications(starts_serve)
        finally:
            ray.kill(self._controller)
            self._folder.write(state="stopped")

    def _delete_applications(self, starts_serve: bool) -> None:
        import ray
        from ray import serve

        from swift_dist.serving.deployment.apps import Applications

        ray.get(self._controller.stop.remote())
        applications = Applications(self._spec.name)
        for version in applications.running():
            applications.delete(version, wait=True)
        if starts_serve and not serve.status().applications:
            serve.shutdown()
