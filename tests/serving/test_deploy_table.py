"""Tables of docs/tables: how long a deployment takes to recover, and how its replicas follow the load.

What is asserted holds on any machine: no request lost where none may be, everything good again. The times are this
machine's.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_model import save_chat_model
from deployment import Deployment, wait_until
from load_generator import Load, chat_body
from toy_engine import save_toy_model

from swift_dist.errors import RunError

TABLES = Path(__file__).parents[2] / "docs" / "tables"
REQUESTS, CLIENTS = 1000, 64
ENGINES = ("hf", "vllm")
CPU = ("--cpu_cache_gib", "1")


def machine() -> str:
    day = datetime.date.today().isoformat()
    return f"{day}, {os.cpu_count()} CPUs of {platform.machine()}, load {os.getloadavg()[0]:.0f} at the start"


def kill_replica(deployment: Deployment) -> None:
    os.kill(deployment.replicas()[0]["pids"][0], signal.SIGKILL)


def kill_guard(deployment: Deployment) -> None:
    os.kill(deployment.replicas()[0]["pids"][1], signal.SIGKILL)


def kill_server(deployment: Deployment) -> None:
    os.kill(deployment.engine_pids(deployment.replicas()[0])[0], signal.SIGKILL)


def kill_core(deployment: Deployment) -> None:
    """The last process that vLLM started."""
    os.kill(deployment.engine_pids(deployment.replicas()[0])[-1], signal.SIGKILL)


def kill_serve(deployment: Deployment) -> None:
    os.kill(deployment.pids_of(b"ray::ServeController")[0], signal.SIGKILL)


def kill_controller(deployment: Deployment) -> None:
    os.kill(deployment.pids_of(b"ray::Controller")[0], signal.SIGKILL)


KILLS: dict[str, Callable[[Deployment], None]] = {
    "replica (Ray's actor)": kill_replica,
    "guard of an engine": kill_guard,
    "engine's server": kill_server,
    "vLLM's EngineCore": kill_core,
    "Serve's controller": kill_serve,
    "the deployment's controller": kill_controller,
}


def recovered(deployment: Deployment, before: set[str], is_replica: bool) -> bool:
    """Two replicas answer, another one among them where one was lost, and the control API does."""
    with contextlib.suppress(RunError):
        now = {replica["id"] for replica in deployment.replicas()}
        return len(now) == 2 and (now != before) == is_replica
    return False


def one_kill(deployment: Deployment, name: str, kill: Callable[[Deployment], None]) -> dict[str, Any]:
    before = {r["id"] for r in deployment.wait_for(2, "tiny-v1", 300)}
    body = chat_body("tiny", "the red moon", max_tokens=8)
    with Load(deployment.url, [body], concurrency=CLIENTS, requests=REQUESTS).in_background() as running:
        running.wait_for(100)
        began = time.monotonic()
        kill(deployment)
        wait_until(
            lambda: recovered(deployment, before, "controller" not in name), 400, f"recovery from the loss of {name}"
        )
        seconds = time.monotonic() - began
    report = running.report
    assert not report.failures, f"{name}: {report.describe()}"
    slowest = max(answer.seconds for answer in report.answers)
    lost = REQUESTS - len(report.good)
    return {"name": name, "seconds": seconds, "answers": len(report.answers), "lost": lost, "slowest": slowest}


@pytest.mark.table
@pytest.mark.timeout(3000)
def test_recovery_times(tmp_path):
    model = save_chat_model(tmp_path / "tiny")
    where = machine()
    lines = []
    for engine in ENGINES:
        words = ["--model", str(model), "--infer_backend", engine, "--dtype", "fp32", "--replicas", "2", *CPU]
        with Deployment(tmp_path / engine, *words, "--max_model_len", "256") as deployment:
            deployment.wait_ready(600)
            for name, kill in KILLS.items():
                if engine == "hf" and kill is kill_core:
                    continue  # a single process
                row = one_kill(deployment, name, kill)
                lines.append(
                    f"| {engine} | {row['name']} | {row['answers']} | {row['lost']} | {row['slowest']:.1f} "
                    f"| {row['seconds']:.1f} |"
                )
    head = [
        "# Recovery of a deployment",
        "",
        f"SIGKILL of one process under {CLIENTS} clients and {REQUESTS} requests that are not streamed, two replicas",
        f"of a model of 20,000 parameters. Written by `make tables`: {where}.",
        "",
        "| engine | killed | requests | lost | slowest answer, s | until two replicas answer, s |",
        "|---|---|---|---|---|---|",
    ]
    (TABLES / "serving_recovery.md").write_text("\n".join([*head, *lines]) + "\n")


@pytest.mark.table
@pytest.mark.timeout(900)
def test_replicas_follow_the_load(tmp_path):
    """1 -> 3 -> 1, and no request fails while replicas come and go."""
    model = save_toy_model(tmp_path / "tiny", "hello", seconds=0.5)
    words = ["--model", str(model), "--infer_backend", "toy_engine:ENGINE", "--autoscale", "1:3"]
    words += ["--target_ongoing_requests", "4", "--upscale_delay", "2", "--downscale_delay", "8"]
    rows: list[tuple[float, int, int, int]] = []
    with Deployment(tmp_path / "deployment", *words) as deployment:
        deployment.wait_ready()
        began = time.monotonic()

        def look() -> tuple[int, int]:
            status = deployment.status()
            wanted = status["models"][0]["versions"][0]["num_replicas"]
            ready = sum(replica["state"] == "ready" for replica in status["replicas"])
            asked = sum(replica["running"] + replica["waiting"] for replica in status["replicas"])
            rows.append((time.monotonic() - began, asked, wanted, ready))
            time.sleep(0.3)
            return wanted, ready

        reports = []
        for clients, replicas, patience in ((2, 1, 10), (11, 3, 120), (2, 1, 120)):
            with Load(deployment.url, [chat_body("tiny", "hello")], concurrency=clients).in_background() as running:
                wait_until(lambda n=replicas: look() == (n, n), patience, f"{replicas} replicas")
                until = time.monotonic() + 5
                while time.monotonic() < until:
                    assert look()[0] == replicas
            reports.append(running.report)
    assert not [failure for report in reports for failure in report.failures]
    plot(rows, TABLES / "serving_autoscaling.png")


def plot(rows: list[tuple[float, int, int, int]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    seconds, asked, wanted, ready = zip(*rows, strict=True)
    figure, axis = pyplot.subplots(figsize=(8, 3.5))
    axis.plot(seconds, asked, color="0.6", label="requests that run or wait")
    axis.step(seconds, wanted, where="post", label="replicas wanted")
    axis.step(seconds, ready, where="post", label="replicas that answer")
    axis.set_xlabel("seconds")
    axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
