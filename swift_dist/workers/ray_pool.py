"""Workers as Ray actors: the same task over the nodes of a cluster."""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from swift_dist.errors import JobError, RunError
from swift_dist.workers.pool import Task
from swift_dist.workers.process import AGAIN, ONE_THREAD, Answer, Doer

logger = logging.getLogger(__name__)

_START_SECONDS = 60.0
_CONNECT_SECONDS = 10.0

Node = tuple[str, str]
"""Host name, and Ray's id: nodes that are one machine (a test bed) share the name."""


class _Actor:
    """Runs on a node; one CPU."""

    def __init__(self, task: Task, folder: str) -> None:
        self._doer, self._folder = Doer(task.start), Path(folder)

    def node(self) -> tuple[Node, bool]:
        """Where it runs, and whether the folder is there."""
        import ray

        return (socket.gethostname(), ray.get_runtime_context().get_node_id()), self._folder.is_dir()

    def answer(self, unit: Any) -> Answer:
        return self._doer.answer(unit)


class RayWorker:
    """One actor, seen as a `pool.Worker`.

    Attributes:
        node: where it runs, once that is known; done: units that it has finished.
    """

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.node: Node = ("", "")
        self.done = 0
        self._pending: deque[Any] = deque()

    def submit(self, unit: Any) -> None:
        self._pending.append(self.actor.answer.remote(unit))

    def result(self) -> Any:
        import ray

        try:
            result, error = ray.get(self._pending.popleft())
        except ray.exceptions.RayError as lost:
            reason = str(lost).strip().splitlines()[0]
            raise RunError(f"a Ray worker was lost: {reason}", AGAIN) from None
        if error is not None:
            raise error
        self.done += 1
        return result

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


def connect(address: str | None) -> Callable[[], None]:
    """Connect this process to a running cluster, unless it is; returns what ends the connection again if it was made.

    Args:
        address: of the cluster, or None: RAY_ADDRESS, else the one that runs on this machine.

    Raises:
        JobError: no cluster there.
    """
    import ray

    if ray.is_initialized():
        return lambda: None
    _require_listener(address or os.environ.get("RAY_ADDRESS"))
    try:
        ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(str(error).strip().splitlines()[0]) from None
    return ray.shutdown


class RayPool:
    """A connection to a running cluster, and actors spread over it.

    Args:
        task: what they do.
        address: of the cluster, or None: RAY_ADDRESS, else the one that runs on this machine.
        num_workers: actors, or None: one for each CPU of the cluster.
        folder: what every node must see: where the workers write.

    Raises:
        JobError: no cluster there.
        RunError: no CPU free within a minute, or a node that does not see the folder.
    """

    def __init__(self, task: Task, address: str | None, num_workers: int | None, folder: Path) -> None:
        import ray

        self._disconnect = connect(address)
        self.workers: list[RayWorker] = []
        try:
            self._start(task, num_workers or int(ray.cluster_resources().get("CPU", 1)), folder)
        except BaseException:
            self.close()
            raise

    def _start(self, task: Task, count: int, folder: Path) -> None:
        import ray

        options = {
            "num_cpus": 1,
            "scheduling_strategy": "SPREAD",
            "runtime_env": {"env_vars": ONE_THREAD},
        }
        shared = ray.put(task)
        actor_class: Any = ray.remote(_Actor)
        self.workers = [RayWorker(actor_class.options(**options).remote(shared, str(folder))) for _ in range(count)]
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
        for worker, (node, sees_folder) in zip(self.workers, places, strict=True):
            worker.node = node
            if not sees_folder:
                raise RunError(
                    f"node {node[0]} does not see {folder}",
                    "name one on storage that every node has mounted",
                )

    def shares(self) -> list[str]:
        """What each node's workers did, in words."""
        workers = Counter(worker.node for worker in self.workers)
        done: Counter[Node] = Counter()
        for worker in self.workers:
            done[worker.node] += worker.done
        return [f"{done[node]} on {node[0]} ({count} workers)" for node, count in sorted(workers.items())]

    def close(self) -> None:

        if any(worker.done for worker in self.workers):
            logger.info("units of work: %s", ", ".join(self.shares()))
        for worker in self.workers:
            worker.close()
        self._disconnect()
