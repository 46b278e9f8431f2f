"""Workers of `data prepare` as Ray actors: the same units over the nodes of a cluster."""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from swift_dist.data.encoder import Encoder, Recipe
from swift_dist.data.parts import PartFacts
from swift_dist.data.pool import raise_failure
from swift_dist.data.units import Unit
from swift_dist.data.work_process import Failure, describe
from swift_dist.errors import JobError, RunError

logger = logging.getLogger(__name__)

_START_SECONDS = 60.0
_CONNECT_SECONDS = 10.0


class _Actor:
    """Runs on a node; one CPU."""

    def __init__(self, recipe: Recipe) -> None:
        self._encoder = Encoder(recipe)
        self._parts = Path(recipe.parts)

    def node(self) -> tuple[str, bool]:
        """Host name, and whether the output's folder is there."""
        return socket.gethostname(), self._parts.is_dir()

    def encode(self, unit: Unit) -> tuple[PartFacts | None, Failure | None]:
        try:
            return self._encoder.encode(unit), None
        except Exception as error:
            return None, describe(error)


class RayWorker:
    """One actor, seen as a `pool.Worker`."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self._pending: deque[Any] = deque()

    def submit(self, unit: Unit) -> None:
        self._pending.append(self.actor.encode.remote(unit))

    def result(self) -> PartFacts:
        import ray

        try:
            facts, failure = ray.get(self._pending.popleft())
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise RunError(f"a Ray worker was lost: {reason}", "repeat the command: it goes on where it was") from None
        if failure is not None:
            raise_failure(failure)
        return facts

    def close(self) -> None:
        import ray

        with suppress(Exception):  # the cluster itself may be gone
            ray.kill(self.actor)


def _require_listener(address: str | None) -> None:
    """Refuse host:port at which nothing listens: Ray itself would wait for minutes."""
    host, _, port = (address or "").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto" and the like: Ray finds out quickly
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise _no_cluster(f"{address}: {error}") from None


def _no_cluster(reason: str) -> JobError:
    remedy = "give --ray_address, start a cluster with `ray start --head`, or use --launcher local"
    return JobError("ray_address", f"no Ray cluster answers: {reason}", remedy)


class RayPool:
    """A connection to a running cluster, and actors spread over it.

    Args:
        recipe: what they work by.
        address: of the cluster, or None: RAY_ADDRESS, else the one that runs on this machine.
        num_workers: actors, or None: one for each CPU of the cluster.

    Raises:
        JobError: no cluster there.
        RunError: no CPU free within a minute, or a node that does not see the output's folder.
    """

    def __init__(self, recipe: Recipe, address: str | None, num_workers: int | None) -> None:
        import ray

        self._ours = not ray.is_initialized()
        if self._ours:
            _require_listener(address or os.environ.get("RAY_ADDRESS"))
            try:
                ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.WARNING)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise _no_cluster(str(error).strip().splitlines()[0]) from None
        self.workers: list[RayWorker] = []
        try:
            self._start(recipe, num_workers or int(ray.cluster_resources().get("CPU", 1)))
        except BaseException:
            self.close()
            raise

    def _start(self, recipe: Recipe, count: int) -> None:
        import ray

        options = {
            "num_cpus": 1,
            "scheduling_strategy": "SPREAD",
            "runtime_env": {"env_vars": {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}},
        }
        shared = ray.put(recipe)
        actor_class: Any = ray.remote(_Actor)
        self.workers = [RayWorker(actor_class.options(**options).remote(shared)) for _ in range(count)]
        answers = {worker.actor.node.remote(): worker for worker in self.workers}
        ready, late = ray.wait(list(answers), num_returns=count, timeout=_START_SECONDS)
        if not ready:
            raise RunError(
                f"no CPU of the cluster was free within {_START_SECONDS:.0f} s", "try later, or --launcher local"
            )
        if late:
            logger.warning("%d of %d workers found no free CPU; going on with %d", len(late), count, len(ready))
        for reference in late:
            answers[reference].close()
        self.workers = [answers[reference] for reference in ready]
        try:
            places = ray.get(ready)
        except ray.exceptions.RayError as error:
            raise RunError(f"a Ray worker could not start: {error}", "install swift_dist on every node") from None
        for host, sees_output in places:
            if not sees_output:
                raise RunError(
                    f"node {host} does not see {recipe.parts}",
                    "give an --output on storage that every node has mounted",
                )

    def close(self) -> None:
        import ray

        for worker in self.workers:
            worker.close()
        if self._ours:
            ray.shutdown()
