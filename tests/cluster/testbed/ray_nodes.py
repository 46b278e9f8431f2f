"""A Ray cluster on three simulated nodes, with token authentication, and a fourth node from which users reach it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nodes import Network, Node, ended, inner

ROOT = Path(__file__).parents[3]
TOKEN = "only-the-users-of-this-cluster-know-it"
CPUS = 4
"""Logical CPUs that each node declares."""
PATIENCE = 180.0
_OBJECT_STORE = 80 * 2**20  # the least that Ray takes
_OF_A_JOB = ("swift-dist ", "ray::")
_RAYS_OWN = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")


def missing() -> str | None:
    """Why `swift-dist` cannot be started on a node; None: it can."""
    if not Path(sys.executable).with_name("swift-dist").exists():
        return f"there is no swift-dist beside {sys.executable}: pip install -e ."
    return None


def variables(scratch: Path, token: str | None = TOKEN) -> dict[str, str]:
    """The environment of a user, or of an administrator who starts Ray; `scratch` is for temporary files."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "NPROC_PER_NODE"}
    plain["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{plain['PATH']}"
    plain["PYTHONPATH"] = str(ROOT)
    plain.update(TMPDIR=str(scratch), OMP_NUM_THREADS="1", RAY_USAGE_STATS_ENABLED="0", HF_HUB_OFFLINE="1")
    return plain if token is None else {**plain, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


class Call:
    """A command that a user has typed on a node."""

    def __init__(self, node: Node, words: Sequence[str], folder: Path, env: dict[str, str]) -> None:
        number = len(list(folder.glob(".call-*.out")))
        self._out, self._err = folder / f".call-{number}.out", folder / f".call-{number}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = node.start(words, env, cwd=folder, output=out, errors=err)

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.err}") from None

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.kill(inner(self.process), signal.SIGINT)

    def until(self, condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
        """The first true value of `condition`, while the command runs."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert self.process.poll() is None, f"ended before {what}:\n{self.err}"
            assert time.monotonic() < deadline, f"no {what} within {seconds} s:\n{self.err}"
            time.sleep(0.05)
        return value


class RayCluster:
    """n1 (head), n2 and n3; `login` is on the same network and part of no cluster. All share `scratch` as TMPDIR."""

    def __init__(self, network: Network) -> None:
        self.scratch = network.folder / "scratch"
        self.scratch.mkdir()
        *self.nodes, self.login = network.nodes
        self.address = f"http://{self.nodes[0].address}:8265"

    def call(self, folder: Path, *words: str, token: str | None = TOKEN) -> Call:
        """Type a command on the login node."""
        return Call(self.login, words, folder, variables(self.scratch, token))

    def swift_dist(self, folder: Path, *words: str, token: str | None = TOKEN) -> Call:
        return self.call(folder, "swift-dist", *words, token=token)

    def left(self) -> list[str]:
        """Processes on the nodes that belong to a job."""
        lines = [line for node in self.nodes for line in node.processes().values()]
        return [x for x in lines if any(word in x for word in _OF_A_JOB) and not x.startswith(_RAYS_OWN)]

    def assert_nothing_left(self, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == [], left


@contextlib.contextmanager
def ray_cluster(folder: Path) -> Iterator[RayCluster]:
    """A cluster that is up, and gone afterwards."""
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(Network(["n1", "n2", "n3", "login"], folder))
        cluster = RayCluster(network)
        ray = shutil.which("ray", path=variables(cluster.scratch)["PATH"])
        assert ray, "there is no ray beside swift-dist"
        head, started = cluster.nodes[0], []
        for node in cluster.nodes:
            words = (
                ["--head", "--dashboard-host=0.0.0.0", "--temp-dir=/tmp/ray"]
                if node is head
                else [f"--address={head.address}:6379"]
            )
            words += [
                f"--node-ip-address={node.address}",
                f"--num-cpus={CPUS}",
                f"--object-store-memory={_OBJECT_STORE}",
            ]
            log = stack.enter_context((node.folder / "ray.log").open("wb"))
            process = node.start(
                [sys.executable, ray, "start", "--block", *words], variables(cluster.scratch), output=log
            )
            started.append(stack.enter_context(ended(process)))
            if node is head:
                _await(cluster, started, "/api/version", lambda text: True)
        _await(cluster, started, "/api/v0/nodes?detail=1", lambda text: text.count('"ALIVE"') == len(cluster.nodes))
        yield cluster


_ASK = "import sys, urllib.request as u; print(u.urlopen(u.Request(sys.argv[1], headers={'Authorization': 'Bearer ' + \
sys.argv[2]}), timeout=5).read().decode())"


def _await(
    cluster: RayCluster,
    started: Sequence[subprocess.Popen[bytes]],
    path: str,
    good: Callable[[str], bool],
    seconds: float = 90.0,
) -> None:
    """Until the dashboard gives a good answer, while what was started lives."""
    deadline = time.monotonic() + seconds
    while True:
        asked = cluster.call(cluster.login.folder, sys.executable, "-IS", "-c", _ASK, cluster.address + path, TOKEN)
        if asked.wait() == 0 and good(asked.out):
            return
        logs = "\n".join(p.read_text()[-1000:] for p in cluster.login.folder.parent.glob("*/ray.log"))
        alive = not any(process.poll() is not None for process in started)
        assert alive and time.monotonic() < deadline, f"no cluster within {seconds} s: {asked.err}\n{logs}"
        time.sleep(0.3)
