"""`swift-dist infer --launcher ray` on a cluster of two nodes: an engine on each, and one of both is lost.

The case runs in a process of its own: Ray keeps the settings of a process's earlier clusters for its life.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from chat_model import save_chat_model, save_rows

from swift_dist.errors import RunError
from swift_dist.serving.inference.pool import EnginePool
from swift_dist.serving.inference.replicas import RemoteReplica

CASE = """
import json, os, signal, sys, threading, time, urllib.request
from pathlib import Path
from ray.cluster_utils import Cluster
import ray
import swift_dist
from swift_dist.lifetime import descendants
from swift_dist.serving.inference import ray_engines

model, data, output = sys.argv[1:]
started, start = {}, ray_engines.RayReplica.start

def remembered(replica):
    url = start(replica)
    started.setdefault(replica._number, []).append(url)
    return url

ray_engines.RayReplica.start = remembered

def answers(url):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    lines = opener.open(url + "/metrics", timeout=60).read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("swift_dist:request_success_total{"))

def wait(condition, what):
    deadline = time.monotonic() + 400
    while not condition():
        assert infer.is_alive(), f"ended before {what}"
        assert time.monotonic() < deadline, what
        time.sleep(0.1)

def servers(node):
    pids = [p for r in node.all_processes["raylet"] for p in descendants(r.process.pid)]
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids}
    return [pid for pid, words in commands.items() if b"serving.hf.server" in words and b"_guard" not in words]

nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
second = nodes.add_node(num_cpus=1)
first = nodes.head_node
keys = dict(model=model, infer_backend="hf", dtype="fp32", dataset=data, output=output, max_tokens=24, temperature=0,
            launcher="ray", ray_address=nodes.address, replicas=2, concurrency=4)
found = {}
infer = threading.Thread(target=lambda: found.update(swift_dist.infer(**keys)))
infer.start()
try:
    wait(lambda: len(started) == 2, "both are ready")
    on_each = [len(servers(node)) for node in (first, second)]
    wait(lambda: all(answers(urls[-1]) >= 3 for urls in started.values()), "both answer")
    lost, left = servers(first)[-1], servers(second)
    os.kill(left[-1], signal.SIGSTOP)  # it keeps its rows, however soon all others are answered
    os.kill(lost, signal.SIGKILL)
    wait(lambda: sum(map(len, started.values())) == 3, "another engine instead of the killed one")
    ray_engines._ACTOR_SECONDS = 10.0  # for the place that is lost now
    nodes.remove_node(second, allow_graceful=False)
    infer.join(400)
    deadline = time.monotonic() + 30
    while not (gone := not any(Path(f"/proc/{pid}").exists() for pid in left)) and time.monotonic() < deadline:
        time.sleep(0.1)
    print(json.dumps({**found, "on_each": on_each, "gone": gone, "connected": ray.is_initialized()}))
finally:
    nodes.shutdown()
"""


@pytest.mark.slow
@pytest.mark.timeout(600)  # three engines start, one after a kill: minutes on a busy machine
def test_a_lost_engine_and_a_lost_node_lose_no_row(tmp_path: Path) -> None:
    model = save_chat_model(tmp_path / "tiny", initializer_range=0.1)
    given = [{"query": f"the moon {number}", "id": number} for number in range(300)]
    data, output = save_rows(tmp_path / "rows.jsonl", given), tmp_path / "out.jsonl"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", CASE, model, data, output],
        env={**clean, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["on_each"] == [1, 1] and result["gone"] and not result["connected"]
    assert (result["rows"], result["failed"]) == (300, 0)
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == list(range(300))


def test_others_go_on_without_a_replica_that_cannot_be_started_again() -> None:
    """Only where none is left, or one never was there, the whole fails."""
    import asyncio

    class Once(RemoteReplica):
        is_ours = True

        def __init__(self, name: str, times: int) -> None:
            super().__init__(name)
            self.times, self.lives = times, True

        def start(self) -> str:
            if not self.times:
                raise RunError("there is no room")
            self.times, self.lives = self.times - 1, True
            return "http://127.0.0.1:9"

        def alive(self) -> bool:
            return self.lives

    async def ask(replicas: list[Once], lost: list[Once]) -> str:
        async def send(client: object) -> str:
            return "answer"

        async with EnginePool(replicas, 1) as pool, asyncio.timeout(60):
            await pool.ask(send)
            for replica in lost:
                replica.lives = False
            while lost and not all(place.is_given_up for place in pool._places if place.replica in lost):
                await asyncio.sleep(0.01)
            return await pool.ask(send)

    one, two = Once("one", 1), Once("two", 1)
    assert asyncio.run(ask([one, two], [one])) == "answer"
    with pytest.raises(RunError, match="there is no room"):
        one, two = Once("one", 1), Once("two", 1)
        asyncio.run(ask([one, two], [one, two]))
    with pytest.raises(RunError, match="there is no room"):
        asyncio.run(ask([Once("one", 0)], []))
