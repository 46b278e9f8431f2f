"""The Ray cluster of a job: attach to one that runs, or start one of our own and end it (and only that one)."""

from __future__ import annotations

import json
import logging
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

from swift_dist.errors import JobError, RunError

log = logging.getLogger(__name__)

_START_SECONDS = 120.0


@dataclass(frozen=True)
class ClusterSpec:
    """What a job asks of a cluster.

    Attributes:
        address: GCS address of a running cluster, or None: RAY_ADDRESS, else one of its own.
        nnodes: nodes; an own cluster simulates them on this machine with a raylet each.
        num_cpus: logical CPUs per node of an own cluster.
        num_gpus: GPUs per node of an own cluster.
        dashboard: serve Ray's dashboard on 127.0.0.1 (own cluster).
    """

    address: str | None
    nnodes: int
    num_cpus: float
    num_gpus: int
    dashboard: bool = False


class Cluster:
    """Opens in the constructor's background, connects in `connect`, ends in `close`. A context manager.

    Attributes:
        is_own: whether this object started the cluster.
    """

    def __init__(self, spec: ClusterSpec, environment: Mapping[str, str] | None = None) -> None:
        """Begin to start an own cluster if one is needed: returns at once, `connect` waits.

        Args:
            spec: what is asked for.
            environment: variables that an own cluster's processes get beside this process's.
        """
        self._spec = spec
        self._address = spec.address or os.environ.get("RAY_ADDRESS") or None
        self.is_own = self._address in (None, "local")
        self._host: subprocess.Popen[str] | None = None
        self._connected = False
        self._saved: dict[str, str | None] = {}
        if self.is_own:
            self._set_variables(_own_cluster_variables())
            self._host = _start_host(spec, environment or {})

    def connect(self) -> None:
        """Connect this process as the driver.

        Raises:
            JobError: nothing answers at the address.
            RunError: the own cluster did not start.
        """
        import ray  # while the cluster starts in its own process

        address = self._own_address() if self._host else self._address
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
        self._connected = True

    def close(self) -> None:
        """Disconnect; end the cluster if it is our own. Nothing of it runs afterwards."""
        if self._connected:
            import ray

            ray.shutdown()
            self._connected = False
        if self._host is not None:
            host, self._host = self._host, None
            assert host.stdin and host.stdout
            host.stdin.close()
            try:
                host.wait(timeout=20)
            except subprocess.TimeoutExpired:
                host.kill()
                host.wait()
            host.stdout.close()
        for name, value in self._saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._saved = {}

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
            log.info("Ray dashboard: http://%s", answer["dashboard"])
        return answer["address"]

    def _set_variables(self, variables: Mapping[str, str]) -> None:
        for name, value in variables.items():
            self._saved[name] = os.environ.get(name)
            os.environ[name] = value


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
        "RAY_DEDUP_LOGS": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def _start_host(spec: ClusterSpec, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    request = {
        "num_cpus": spec.num_cpus,
        "num_gpus": spec.num_gpus,
        "nnodes": spec.nnodes,
        "dashboard": spec.dashboard,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "swift_dist.cluster.host", json.dumps(request)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **environment},
        text=True,
        start_new_session=True,  # the terminal's Ctrl-C goes to the driver alone
    )
