"""A deployment over the nodes of a Ray cluster, one of which is cut off: no request is lost, and a replica moves."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nodes
import pytest
import ray_nodes
from chat_model import save_chat_model
from ray_nodes import Call, RayCluster, variables

_REASON = nodes.missing() or ray_nodes.missing()
pytestmark = [
    *(pytest.mark.testbed, pytest.mark.slow, pytest.mark.timeout(600)),
    pytest.mark.skipif(_REASON is not None, reason=str(_REASON)),
]
SUPPORT = Path(__file__).parents[2] / "support"
CLIENTS, REQUESTS, BEFORE = 64, 1000, 200
RECOVERY_SECONDS = 240.0
_LOAD = """
import json, sys
from load_generator import Load, chat_body
url, clients, requests, before = sys.argv[1], *map(int, sys.argv[2:])
body = chat_body("tiny", "the red moon is", max_tokens=8, temperature=0)
with Load(url, [body], clients, requests, keep=True).in_background() as running:
    running.wait_for(before)
    print("under way", flush=True)
report = running.report
said = {json.loads(answer.body)["choices"][0]["message"]["content"] for answer in report.good}
print(json.dumps({
    "answers": len(report.answers), "failed": len(report.failures), "said": len(said),
    "slowest": max(answer.seconds for answer in report.answers), "report": report.describe(),
}))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    with ray_nodes.ray_cluster(tmp_path_factory.mktemp("ray") / "net") as up:
        yield up


def on_head(cluster: RayCluster, folder: Path, *words: str) -> Call:
    """Type a command on the node where the deployment runs: only there are its front and its control API reached."""
    paths = [str(SUPPORT), variables(cluster.scratch)["PYTHONPATH"]]
    env = {**variables(cluster.scratch), "PYTHONPATH": os.pathsep.join(paths)}
    return Call(cluster.nodes[0], words, folder, env)


def replicas(cluster: RayCluster, folder: Path, output: Path) -> dict[str, str]:
    """Replica -> address of its node, of those that answer."""
    asked = on_head(cluster, folder, "swift-dist", "deploy", "--status", "--json", "--output", str(output))
    if asked.wait() != 0:
        return {}
    found: list[dict[str, Any]] = json.loads(asked.out)["replicas"]
    return {one["id"]: one["host"] for one in found if one["state"] == "ready"}


def test_a_cut_node_of_a_deployment_loses_no_request(cluster: RayCluster, tmp_path: Path) -> None:
    model, output = save_chat_model(tmp_path / "tiny"), tmp_path / "run"
    head = cluster.nodes[0]
    words = ["--model", str(model), "--infer_backend", "hf", "--dtype", "fp32", "--replicas", "2"]
    words += ["--cpus_per_replica", "3", "--address", f"{head.address}:6379", "--output", str(output)]
    deployment = on_head(cluster, tmp_path, "swift-dist", "deploy", *words, "--drain", "10")
    deployment.until(lambda: "ready after" in deployment.err, "a deployment that is ready")
    before = replicas(cluster, tmp_path, output)
    assert len(before) == 2 and len(set(before.values())) == 2, "a replica has 3 of a node's 4 CPUs"
    lost = next(node for node in cluster.nodes[1:] if node.address in before.values())

    numbers = map(str, (CLIENTS, REQUESTS, BEFORE))
    load = on_head(cluster, tmp_path, sys.executable, "-c", _LOAD, "http://127.0.0.1:8000", *numbers)
    load.until(lambda: "under way" in load.out, "a load that is under way")
    lost.set_link(False)
    began = time.monotonic()
    while len(now := replicas(cluster, tmp_path, output)) < 2 or lost.address in now.values():
        assert time.monotonic() - began < RECOVERY_SECONDS, deployment.err
    seconds = time.monotonic() - began
    assert load.wait() == 0, load.err
    report = json.loads(load.out.splitlines()[-1])
    print(
        f"node cut: {report['answers']} answers, {report['failed']} failed, slowest {report['slowest']:.1f} s, two "
        f"replicas after {seconds:.1f} s, load {os.getloadavg()[0]:.0f}"
    )
    assert (report["answers"], report["failed"], report["said"]) == (REQUESTS, 0, 1), report["report"]

    lost.set_link(True)
    deployment.interrupt()
    assert deployment.wait() == 0, deployment.err
    assert json.loads((output / "deployment.json").read_text())["state"] == "stopped"
    cluster.assert_nothing_left(90)
