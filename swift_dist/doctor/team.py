"""The nodes that are examined, through Ray (an actor a node) or this machine alone (threads)."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from swift_dist.doctor.values import Answer, Exam, Facts, Finding, Here, Node, on_node

_THREADS = 64
"""Calls that a node may have open at once: a check that hangs (a dead file system) must not keep the others waiting."""
_POLL_SECONDS = 0.1


class Examiner:
    """The node part: calls the checks' functions and keeps what they put aside. An actor, or a plain object."""

    def __init__(self, exam: Exam, node: Node) -> None:
        self._exam, self._node = exam, node
        self._kept: dict[str, dict[str, Any]] = {}

    def call(self, function: Callable[..., Any], *arguments: Any) -> Answer:
        """Its value, or the error as text: an exception's class may be unknown to the driver."""
        kept = self._kept.setdefault(function.__module__, {})
        try:
            return Answer(function(Here(self._exam, self._node, kept), *arguments))
        except Exception as error:
            return Answer(error=traceback.format_exception_only(error)[-1].strip())


class BaseTeam:
    """Teams differ in how a function is called on a node; see `swift_dist.doctor.values.Team`."""

    def __init__(self, nodes: Sequence[Node], exam: Exam, deadline: float) -> None:
        self.nodes, self.exam = list(nodes), exam
        self._deadline = deadline

    def seconds_left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def ask(
        self,
        function: Callable[..., Any],
        arguments: Mapping[str, Any] | None = None,
        nodes: Sequence[str] | None = None,
        seconds: float | None = None,
    ) -> dict[str, Answer]:
        names = (
            list(arguments) if arguments is not None else (nodes if nodes is not None else [n.name for n in self.nodes])
        )
        calls = {name: (function, *([arguments[name]] if arguments is not None else [])) for name in names}
        wait = min(self.seconds_left(), seconds if seconds is not None else float("inf"))
        answers = dict(self._call(calls, wait))
        return {name: answers.get(name, Answer(error=f"no answer within {wait:.0f} s")) for name in names}

    def _call(self, calls: Mapping[str, tuple[Any, ...]], seconds: float) -> Iterator[tuple[str, Answer]]:
        raise NotImplementedError

    def close(self) -> None:
        """End what runs on the nodes."""


class CheckTeam(BaseTeam):
    """A team as one check sees it: with the check's deadline, and a note of every node that gave it no value."""

    def __init__(self, team: BaseTeam, check: str, seconds: float) -> None:
        super().__init__(team.nodes, team.exam, min(team._deadline, time.monotonic() + seconds))
        self._team, self._check = team, check
        self.failed: list[Finding] = []

    def values(
        self,
        function: Callable[..., Any],
        arguments: Mapping[str, Any] | None = None,
        nodes: Sequence[str] | None = None,
    ) -> Facts:
        answers = self.ask(function, arguments, nodes)
        for name, answer in answers.items():
            if answer.error:
                self.failed.append(
                    on_node(self._check, name, "bad", f"could not be looked at: {answer.error}",
                            "look at this node: a file system, a device or a service on it may hang")
                )  # fmt: skip
        return {name: answer.value for name, answer in answers.items() if not answer.error}

    def _call(self, calls: Mapping[str, tuple[Any, ...]], seconds: float) -> Iterator[tuple[str, Answer]]:
        return self._team._call(calls, seconds)


class LocalTeam(BaseTeam):
    """This machine alone, without Ray."""

    def __init__(self, node: Node, exam: Exam, deadline: float) -> None:
        super().__init__([node], exam, deadline)
        self._examiner = Examiner(exam, node)

    def _call(self, calls: Mapping[str, tuple[Any, ...]], seconds: float) -> Iterator[tuple[str, Answer]]:
        for name, (function, *arguments) in calls.items():
            done: list[Answer] = []
            sent = time.time()
            # A daemon thread: one that hangs in the kernel must not keep the command from ending.
            thread = threading.Thread(
                target=lambda f=function, a=tuple(arguments), d=done: d.append(self._examiner.call(f, *a)), daemon=True
            )
            thread.start()
            thread.join(seconds)
            if done:
                yield name, Answer(done[0].value, done[0].error, sent, time.time())


class RayTeam(BaseTeam):
    """One actor on every node, placed there by Ray without asking for resources: busy nodes are examined too."""

    def __init__(self, nodes: Sequence[Node], exam: Exam, deadline: float, reach_seconds: float) -> None:
        """Start the actors and wait for their first word.

        Attributes:
            unreached: findings about nodes that gave none; they are not in `nodes`.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        super().__init__(nodes, exam, deadline)
        self._actors: dict[str, Any] = {
            node.name: ray.remote(Examiner)
            .options(
                num_cpus=0,
                max_restarts=0,
                max_concurrency=_THREADS,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
            )
            .remote(exam, node)
            for node in nodes
        }
        answers = self.ask(_hello, seconds=reach_seconds)
        self.unreached = [
            on_node("reach", name, "bad", f"runs nothing for us: {answer.error}",
                    "look at its raylet's log (/tmp/ray/session_latest/logs); swift-dist must be installed there")
            for name, answer in answers.items()
            if answer.error
        ]  # fmt: skip
        self.nodes = [node for node in self.nodes if not answers[node.name].error]

    def _call(self, calls: Mapping[str, tuple[Any, ...]], seconds: float) -> Iterator[tuple[str, Answer]]:
        import ray

        deadline = time.monotonic() + seconds
        pending, sent = {}, {}
        for name, (function, *arguments) in calls.items():
            sent[name] = time.time()
            pending[self._actors[name].call.remote(function, *arguments)] = name
        while pending and time.monotonic() < deadline:
            done, _ = ray.wait(list(pending), num_returns=1, timeout=min(_POLL_SECONDS, deadline - time.monotonic()))
            received = time.time()
            for call in done:
                name = pending.pop(call)
                try:
                    answer = ray.get(call)
                    yield name, Answer(answer.value, answer.error, sent[name], received)
                except Exception as error:  # Ray's own, and what unpickling may raise where versions differ
                    yield name, Answer(error=f"{type(error).__name__}: {_last_line(error)}")

    def close(self) -> None:
        import ray

        for actor in self._actors.values():
            ray.kill(actor, no_restart=True)


def _hello(here: Here) -> bool:
    return True


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def cluster_nodes(nodes: Sequence[Mapping[str, Any]]) -> list[Node]:
    """Ray's nodes (`ray.nodes()`), under names that tell them apart."""
    hosts = [node["NodeManagerHostname"] for node in nodes]
    return [
        Node(
            f"{host}#{number}" if hosts.count(host) > 1 else host,
            node["NodeManagerAddress"],
            node["NodeID"],
            dict(node["Resources"]),
        )
        for number, (host, node) in enumerate(zip(hosts, nodes, strict=True))
    ]
