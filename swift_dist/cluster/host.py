"""The process that holds a job's own Ray cluster: everything below it ends when it ends, and it ends with the driver.

    python -m swift_dist.cluster.host '{"num_cpus": 2, ...}'

It prints one line of JSON ({"address", "session_dir"} or {"error"}), then waits until its standard input closes, which
the kernel does for it if the driver is killed, or until SIGTERM. Then it kills its whole family: as the subreaper it is
the parent that orphans fall back to, so nothing escapes, not even Ray's agents, which outlive a killed raylet.

Ray's own `ray.init` starts four more processes (dashboard, log monitor, autoscaler, API server) and takes 2 to 4 s
longer; it also listens on all interfaces. Here every server listens on 127.0.0.1 only.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from swift_dist.lifetime import adopt_orphans, end_family

_OBJECT_STORE_BYTES = 80 * 2**20  # the least that Ray takes; the gang moves no tensors through it


def main() -> int:
    spec = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to act on
    adopt_orphans()
    reply = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever Ray prints is not part of the reply
    temp_dir = tempfile.mkdtemp(prefix="swift_dist-ray-")
    signal.signal(signal.SIGTERM, lambda *_: os.close(0))
    try:
        try:
            answer = _start(spec, temp_dir)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}", "logs": _log_tails(temp_dir)}
        print(json.dumps(answer), file=reply, flush=True)
        if "error" not in answer:
            with contextlib.suppress(OSError):  # SIGTERM closes it under the read
                while os.read(0, 1024):
                    pass
        return 1 if "error" in answer else 0
    finally:
        end_family()
        shutil.rmtree(temp_dir, ignore_errors=True)


def _start(spec: dict[str, Any], temp_dir: str) -> dict[str, Any]:
    """Start GCS and one raylet per simulated node. `spec`: num_cpus and num_gpus per node, nnodes, dashboard."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    class LeanNode(Node):
        def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
            if include_dashboard:
                super().start_api_server(include_dashboard=True, raise_on_failure=raise_on_failure)
            else:
                self._webui_url = None

    def params(**more: Any) -> RayParams:
        return RayParams(
            node_ip_address="127.0.0.1",
            num_cpus=spec["num_cpus"],
            num_gpus=spec["num_gpus"],
            object_store_memory=_OBJECT_STORE_BYTES,
            temp_dir=temp_dir,
            no_monitor=True,
            include_log_monitor=False,  # type: ignore[arg-type]  # Ray's annotation is wrong
            include_dashboard=spec["dashboard"],
            dashboard_host="127.0.0.1",
            **more,
        )

    head = LeanNode(params(), head=True, shutdown_at_exit=False, spawn_reaper=True, ray_init_cluster=True)

    # One after the other: the kernel ends a raylet with the thread that started it, so no pool of threads here.
    for _ in range(1, spec["nnodes"]):
        LeanNode(params(gcs_address=head.gcs_address), head=False, shutdown_at_exit=False, spawn_reaper=True)
    return {"address": head.gcs_address, "session_dir": head.get_session_dir_path(), "dashboard": head.webui_url}


def _log_tails(temp_dir: str, num_characters: int = 2000) -> str:
    logs = sorted(Path(temp_dir).glob("session_2*/logs/*.err")) + sorted(Path(temp_dir).glob("session_2*/logs/*.out"))
    return "\n".join(
        f"--- {p.name}\n{p.read_text(errors='replace')[-num_characters:]}" for p in logs if p.stat().st_size
    )


if __name__ == "__main__":
    sys.exit(main())
