"""Nodes as network namespaces on a bridge: links between them can be slow or cut, and file systems differ."""

from __future__ import annotations

import itertools
import os
import pickle
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from swift_dist.doctor.team import BaseTeam
from swift_dist.doctor.values import Answer, Exam, Node

SERVER = Path(__file__).with_name("node_server.py")
BRIDGE = f"swd{os.getpid() % 100000}"
SUBNET = "10.219.7"


def missing() -> str | None:
    """Why there can be no namespaces here."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "tc", "nsenter", "unshare"):
        if shutil.which(program) is None:
            return f"{program} is not installed (iproute2, util-linux)"
    return (
        None if sh(f"ip netns add {BRIDGE}x && ip netns del {BRIDGE}x", check=False) == 0 else "may not make namespaces"
    )


def sh(command: str, check: bool = True) -> int:
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=30)
    assert not check or done.returncode == 0, f"{command}\n{done.stderr}"
    return done.returncode


class Network:
    """`count` namespaces with an address each. A context manager that leaves none of it."""

    def __init__(self, count: int) -> None:
        self.names = [f"{BRIDGE}n{i}" for i in range(1, count + 1)]
        self.addresses = [f"{SUBNET}.{10 + i}" for i in range(1, count + 1)]

    def __enter__(self) -> Network:
        sh(f"ip link add {BRIDGE} type bridge && ip link set {BRIDGE} up")
        for number, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            sh(
                f"ip netns add {name} && ip link add {BRIDGE}v{number} type veth peer name eth0 netns {name} && "
                f"ip link set {BRIDGE}v{number} master {BRIDGE} up && ip -n {name} link set lo up && "
                f"ip -n {name} addr add {address}/24 dev eth0 && ip -n {name} link set eth0 up"
            )
        return self

    def __exit__(self, *exc_info: object) -> None:
        for name in self.names:
            sh(f"ip netns del {name}", check=False)
        sh(f"ip link del {BRIDGE}", check=False)

    def nodes(self) -> list[Node]:
        return [Node(f"n{i}", address) for i, address in enumerate(self.addresses, 1)]


class NamespaceTeam(BaseTeam):
    """An examiner in each namespace. `prepare`: by node a shell command that runs first in its mount namespace."""

    def __init__(self, network: Network, exam: Exam, seconds: float, prepare: Mapping[str, str] | None = None) -> None:
        super().__init__(network.nodes(), exam, time.monotonic() + seconds)
        self._numbers = itertools.count()
        self._answers: dict[int, queue.Queue[Answer]] = {}
        self._servers: dict[str, subprocess.Popen[bytes]] = {}
        for name, node in zip(network.names, self.nodes, strict=True):
            before = (prepare or {}).get(node.name, "true")
            server = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{name}", "unshare", "--mount", "bash", "-c",
                 f'{before} && exec "$0" "$@"', sys.executable, str(SERVER)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            self._servers[node.name] = server
            self._send(node.name, (exam, node))
            threading.Thread(target=self._read, args=(server,), daemon=True).start()

    def _send(self, node: str, value: Any) -> None:
        pipe = self._servers[node].stdin
        assert pipe
        pickle.dump(value, pipe)
        pipe.flush()

    def _read(self, server: subprocess.Popen[bytes]) -> None:
        assert server.stdout
        while True:
            try:
                number, answer = pickle.load(server.stdout)
            except (EOFError, ValueError):
                return
            self._answers[number].put(answer)

    def _call(self, calls: Mapping[str, tuple[Any, ...]], seconds: float) -> Iterator[tuple[str, Answer]]:
        deadline = time.monotonic() + seconds
        asked = {}
        for node, call in calls.items():
            asked[node] = next(self._numbers)
            self._answers[asked[node]] = queue.Queue()
            self._send(node, (asked[node], call))
        sent = time.time()
        for node, number in asked.items():
            try:
                found = self._answers[number].get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                continue
            yield node, Answer(found.value, found.error, sent, time.time())

    def close(self) -> None:
        for server in self._servers.values():
            server.kill()
            server.wait()
            for pipe in (server.stdin, server.stdout):
                assert pipe
                pipe.close()
