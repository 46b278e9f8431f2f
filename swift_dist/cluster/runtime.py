"""The Ray cluster of a job: attach to one that runs, or start one of our own and end it (and only that one)."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from types import ModuleType, TracebackType
from typing import Any

from swift_dist.cluster.devices import Devices, choose_devices, gpus_of_this_machine, gpus_per_node
from swift_dist.cluster.environment import without_dropped
from swift_dist.config.job import ClusterSection
from swift_dist.errors import JobError, RunError

log = logging.getLogger(__name__)

_START_SECONDS = 120.0
_CONNECT_SECONDS = 10.0


class Cluster:
    """The cluster of one job. A context manager: leaving it disconnects, and ends the cluster if it is our own.

    Attributes:
        is_own: whether the job gets a cluster of its own on this machine.
    """

    def __init__(self, settings: ClusterSection) -> None:
        """Nothing is started or contacted yet.

        Args:
            settings: the job's cluster section: `address`, else RAY_ADDRESS, else an own cluster.
        """
        self._settings = settings
        self._address = settings.address or os.environ.get("RAY_ADDRESS") or "local"
        self.is_own = self._address == "local"
        self._host: subprocess.Popen[str] | None = None
        self._connected_to: str | None = None
        self._undo: list[Callable[[], None]] = []

    def devices(self, planning: bool = False) -> Devices:
        """What the ranks compute on. Looks at this machine, or connects to the cluster and asks it.

        Raises:
            JobError: GPUs are asked for and there are too few, or nothing answers at the address.
        """
        if self.is_own:
            return choose_devices(self._settings, gpus_of_this_machine(), "this machine", planning)
        self.connect()
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        nnodes = self._settings.nnodes
        return choose_devices(self._settings, gpus_per_node(nodes, nnodes), "a node of the cluster")

    def start(self, devices: Devices) -> None:
        """Begin to start an own cluster with room for the ranks, nodes simulated by a raylet each. Does not wait."""
        if not self.is_own or self._host:
            return
        self._set_variables(_own_cluster_variables())
        num_cpus = math.ceil(self._settings.cpus_per_rank * devices.nproc_per_node)
        request = {
            "num_cpus": num_cpus,
            "num_gpus": devices.nproc_per_node if devices.use_gpu else 0,
            "nnodes": self._settings.nnodes,
            "dashboard": self._settings.dashboard,
        }
        self._host = subprocess.Popen(
            [sys.executable, "-m", "swift_dist.cluster.host", json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=without_dropped({**os.environ, **self._settings.env}),
            text=True,
            start_new_session=True,  # the terminal's Ctrl-C goes to the driver alone
        )

    def connect(self) -> None:
        """Connect this process as the driver.

        Raises:
            JobError: nothing answers at the address, or this process drives another cluster already.
            RunError: the own cluster did not start.
        """
        import ray  # while the cluster starts in its own process
        import ray._private.ray_constants as ray_constants
        import ray._private.worker as ray_worker
        import ray._raylet as raylet

        if ray.is_initialized():
            self._require_connected()
            return
        address = self._own_address() if self._host else self._address
        if not self.is_own:
            _require_listener(address)
        # A process that imported Ray earlier, or had another cluster, still has the settings and the token of then.
        raylet.Config.initialize("")  # type: ignore[attr-defined]
        raylet.AuthenticationTokenLoader.instance().reset_cache()  # type: ignore[attr-defined]
        if self._host:
            self._replace(ray_constants, "ENABLE_RAY_CLUSTER", False)
        # Ray prints news such as a worker's death to stdout, which belongs to the result; the gang reports it itself.
        self._replace(ray_worker, "print_to_stdstream", lambda data, ignore_prefix: None)
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                configure_logging=False,
                logging_level=logging.WARNING,
                namespace=f"swift_dist-{secrets.token_hex(4)}",
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            if self.is_own:
                raise RunError(f"the job's own Ray cluster cannot be reached: {error}") from error
            raise JobError(
                "cluster.address",
                f"no Ray cluster answers at {address}: {error}",
                "leave it (and RAY_ADDRESS) out for a cluster of the job's own, or start one with `ray start --head`",
            ) from error
        self._undo.append(ray.shutdown)
        self._connected_to = address

    def _require_connected(self) -> None:
        """A program that called `ray.init` itself may run a job on that cluster, but only on that one."""
        import ray

        connected = ray.get_runtime_context().gcs_address
        if self.is_own and connected != self._connected_to:
            raise JobError(
                "cluster.address",
                f"the job wants a Ray cluster of its own, and this process is connected to the one at {connected}",
                f"ray.shutdown() before, or --cluster.address {connected} to run there",
            )

    def close(self) -> None:
        """Disconnect; end the cluster if it is our own. Nothing of it runs afterwards."""
        while self._undo:
            self._undo.pop()()
        self._connected_to = None
        host, self._host = self._host, None
        if host is not None:
            assert host.stdin and host.stdout
            host.stdin.close()  # at which it ends everything below it
            try:
                host.wait(timeout=20)
            except subprocess.TimeoutExpired:
                host.kill()
                host.wait()
            host.stdout.close()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _own_address(self) -> str:
        assert self._host and self._host.stdout
        watchdog = threading.Timer(_START_SECONDS, self._host.kill)
        watchdog.start()
        try:
            line = self._host.stdout.readline()
        finally:
            watchdog.cancel()
        answer = json.loads(line) if line.strip() else {"error": f"it did not start within {_START_SECONDS:.0f} s"}
        if "error" in answer:
            log.error("%s", answer.get("logs", ""))
            raise RunError(f"the job's own Ray cluster did not start: {answer['error']}")
        if answer["dashboard"]:
            # To the terminal only: driver.log begins later. The page asks for the token once.
            log.info("Ray dashboard: http://%s  token: %s", answer["dashboard"], os.environ["RAY_AUTH_TOKEN"])
        return answer["address"]

    def _replace(self, owner: ModuleType, name: str, value: Any) -> None:
        self._undo.append(functools.partial(setattr, owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def _set_variables(self, variables: Mapping[str, str]) -> None:
        for name, value in variables.items():
            self._undo.append(functools.partial(_restore, name, os.environ.get(name)))
            os.environ[name] = value


def _require_listener(address: str) -> None:
    """Ray waits minutes for an address at which nothing listens; ask first.

    Raises:
        JobError: nothing listens there.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", or something that Ray itself refuses at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise JobError(
            "cluster.address",
            f"no Ray cluster answers at {address}: {error}",
            "leave it (and RAY_ADDRESS) out for a cluster of the job's own, or start one with `ray start --head`",
        ) from None


def _own_cluster_variables() -> dict[str, str]:
    """What Ray in this process and in the own cluster must know before it is imported.

    Every server of ours binds 127.0.0.1 (the switch has its name from the systems where that is Ray's default), and
    whoever connects needs a token that only this job's processes know: other users of the machine could connect else.
    """
    return {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # Ray's default, 15, would let any other process of the machine slow a rank down
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a rank without a GPU of its own keeps CUDA_VISIBLE_DEVICES
    }


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
