"""The driver's way to the agents of all nodes: its own node's is a plain object here, the others are actors."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

from swift_dist.cluster.agent import NodeAgent
from swift_dist.cluster.heartbeat import Beat
from swift_dist.errors import RunError

log = logging.getLogger(__name__)

_CALL_SECONDS = 30.0


class Agents:
    """One agent a node.

    Args:
        actors: for every node index an actor handle of `NodeAgent`, or None for the node this process is on.

    Attributes:
        silent: nodes that did not answer when they were last asked to do something.
    """

    def __init__(self, actors: Sequence[Any | None]) -> None:
        self._actors = list(actors)
        self._local = NodeAgent()
        self._node_of: dict[str, int] = {}
        self._beats: dict[str, Beat] = {}
        self._asked: dict[int, Any] = {}
        self.silent: set[int] = set()

    def replace(self, node: int, actor: Any | None) -> None:
        """Another machine is this node of the job now; all processes of the old one are forgotten."""
        self._actors[node] = actor
        self._asked.pop(node, None)
        self.silent.discard(node)
        for name in [name for name, where in self._node_of.items() if where == node]:
            del self._node_of[name]
            self._beats.pop(name, None)

    def offer(self, node: int, names: Sequence[str]) -> dict[str, str]:
        """New records on a node; see `NodeAgent.offer`.

        Raises:
            RunError: the node does not answer.
        """
        paths = self._call(node, "offer", list(names))
        if not paths:
            raise RunError(f"node {node} of the job does not answer", "run the same command again: it resumes")
        self._node_of.update(dict.fromkeys(names, node))
        return paths

    def read(self) -> dict[str, Beat]:
        """What every process last said. Never waits: another node's beats are those of its last answer."""
        import ray

        self._beats.update(self._local.read())
        for node, actor in enumerate(self._actors):
            if actor is None:
                continue
            asked = self._asked.get(node)
            if asked is not None:
                done, _ = ray.wait([asked], timeout=0)
                if not done:
                    continue
                with contextlib.suppress(ray.exceptions.RayError):  # the node is gone: its ranks' calls say so
                    self._beats.update(ray.get(asked))
            self._asked[node] = actor.read.remote()
        return {name: self._beats.get(name, Beat()) for name in self._node_of}

    def request_stop(self, wanted: bool = True) -> None:
        for node in range(len(self._actors)):
            self._call(node, "request_stop", wanted)

    def abort(self, wanted: bool = True) -> None:
        for node in range(len(self._actors)):
            self._call(node, "abort", wanted)

    def kill(self, names: Sequence[str]) -> None:
        for node, here in self._by_node(names).items():
            self._call(node, "kill", here)

    def forget(self, names: Sequence[str]) -> None:
        for node, here in self._by_node(names).items():
            self._call(node, "forget", here)
            for name in here:
                del self._node_of[name]
                self._beats.pop(name, None)

    def dump_stacks(self, names: Sequence[str]) -> dict[str, str]:
        stacks: dict[str, str] = {}
        for node, here in self._by_node(names).items():
            stacks.update(self._call(node, "dump_stacks", here) or {})
        return stacks

    def close(self) -> None:
        self.forget(list(self._node_of))

    def _by_node(self, names: Sequence[str]) -> dict[int, list[str]]:
        nodes: dict[int, list[str]] = {}
        for name in names:
            if name in self._node_of:
                nodes.setdefault(self._node_of[name], []).append(name)
        return nodes

    def _call(self, node: int, method: str, *arguments: Any) -> Any:
        actor = self._actors[node]
        if actor is None:
            return getattr(self._local, method)(*arguments)
        import ray

        try:
            # One that was silent may have been lost: it is not waited for again.
            answer = ray.get(
                getattr(actor, method).remote(*arguments), timeout=1.0 if node in self.silent else _CALL_SECONDS
            )
        except ray.exceptions.RayError as error:  # the node is gone: its ranks' calls say so
            if node not in self.silent:
                log.warning("node %d does not answer %s: %s", node, method, type(error).__name__)
            self.silent.add(node)
            return {}
        self.silent.discard(node)
        return answer
