"""`--launcher ray` on a Ray cluster of three simulated nodes: what the user sees, exit codes, and what stays behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nodes
import pytest
import ray_nodes
import yaml
from ray_nodes import TOKEN, Call, RayCluster
from same_end import assert_same_end
from toy_job import INTERVAL, STEPS, Run, write_job

HERE = Path(__file__).parent
_REASON = nodes.missing() or ray_nodes.missing()
pytestmark = [
    pytest.mark.testbed,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(_REASON is not None, reason=str(_REASON)),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    with ray_nodes.ray_cluster(tmp_path_factory.mktemp("ray") / "net") as up:
        yield up


@pytest.fixture
def folder(tmp_path: Path, two_node_job: str) -> Path:
    """A user's working folder with the job in it."""
    place = tmp_path / "work"
    place.mkdir()
    shutil.copy(two_node_job, place / "job.yaml")
    return place


LONG = ("--train.steps", "20000", "--checkpoint.interval", "1000")


def pretrain(cluster: RayCluster, folder: Path, output: Path, *words: str, **more: Any) -> Call:
    given = ("--launcher", "ray", "--launch.ray.address", cluster.address, "--output", str(output))
    return cluster.swift_dist(folder, "pretrain", "job.yaml", *given, *words, **more)


def step_of(output: Path) -> int:
    rows = (output / "metrics.jsonl").read_text().splitlines() if (output / "metrics.jsonl").exists() else []
    return json.loads(rows[-1])["step"] if rows else 0


def show(cluster: RayCluster, folder: Path, output: Path) -> dict[str, Any]:
    asked = cluster.swift_dist(folder, "runs", "show", str(output), "--json")
    assert asked.wait() == 0, asked.err
    return json.loads(asked.out)


def ports(node: nodes.Node) -> set[str]:
    """Where somebody listens on a node, less the workers that Ray keeps idle and may end or replace at any time."""
    idle = {str(pid) for pid, line in node.processes().items() if line.startswith("ray::IDLE")}
    inside = set()
    for pid in idle:
        with contextlib.suppress(OSError):
            inside.add(Path(f"/proc/{pid}/status").read_text().split("NSpid:")[1].split("\n")[0].split()[-1])
    lines = subprocess.run(
        ["nsenter", "--target", str(node.pid), "--net", "--pid", "--mount", "ss", "-Hltnp"],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    return {line.split()[3] for line in lines if not any(f"pid={pid}," in line for pid in inside)}


def test_the_same_numbers_as_here_and_the_users_code_goes_along(
    cluster: RayCluster, folder: Path, local: Run, tmp_path: Path
):
    """A room behind a link is imported there; a repository, an environment and a large file stay here."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "hello.py").write_text("import sys\nprint('the linked room is here', file=sys.stderr)\n")
    (folder / "rooms").symlink_to(tmp_path / "elsewhere")
    (folder / "sitecustomize.py").write_text("import sys\nif 'pretrain' in sys.argv: import rooms.hello\n")
    (folder / ".git").mkdir()
    (folder / "env").mkdir()
    (folder / "env" / "pyvenv.cfg").touch()
    with (folder / "weights.bin").open("wb") as file:
        file.truncate(11 * 2**20)

    there = pretrain(cluster, folder, tmp_path / "there", "--json")
    assert there.wait() == 0, there.err
    result = json.loads(there.out)
    assert result["state"] == "done" and result["step"] == result["checkpoint"] == STEPS and result["restarts"] == 0
    assert "the linked room is here" in there.err
    assert "not sent along: .git/ (repository), env/ (Python environment), weights.bin (11 MiB)" in there.err
    cluster.assert_nothing_left()
    manifest = json.loads((tmp_path / "there" / "manifest.json").read_text())
    assert len(set(manifest["attempts"][-1]["hosts"])) == 2

    assert_same_end(tmp_path / "there", local)
    names = [sorted(p.name for p in x.iterdir() if p.name[0] != ".") for x in (tmp_path / "there", local.output)]
    assert names[0] == sorted([*names[1], "submission.json"])


@pytest.mark.parametrize(
    ("code", "expected", "words", "seen"),
    [
        ("import os, sys\nif 'pretrain' in sys.argv: print('no luck', flush=True); os._exit(7)", 1, (), "exit code 7"),
        (
            "",
            1,
            ("--launch.ray.runtime_env.env_vars.PATH", "/usr/bin:/bin"),
            "has no command swift-dist",
        ),
    ],
    ids=["exit-7", "no-command"],
)
def test_an_entrypoint_that_fails(cluster, folder, tmp_path, code, expected, words, seen):
    (folder / "sitecustomize.py").write_text(code)
    failed = pretrain(cluster, folder, tmp_path / "run", *words)
    assert failed.wait() == expected, failed.err
    assert seen in failed.err.split("\nswift-dist: ")[-1], failed.err
    state = show(cluster, folder, tmp_path / "run")
    assert state["status"] == "failed" and state["submission"]["launcher"] == "ray"


def test_a_node_with_other_versions_is_named(cluster, folder, tmp_path):
    """What the working folder brings comes first on the nodes: so it can play an old installation."""
    fake = folder / "megatron_core-0.1.dist-info"
    fake.mkdir()
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.1\n")
    refused = pretrain(cluster, folder, tmp_path / "run", "--json")
    assert refused.wait() == 2, refused.err
    error = json.loads(refused.out)["error"]
    assert error["key"] == "launch.ray.check_versions" and "megatron-core 0.1 (submitter:" in error["message"]
    assert "node n1" in error["message"] and refused.err.count("megatron-core 0.1") == 1


@pytest.mark.parametrize(
    ("token", "words", "key", "seen"),
    [
        ("not-the-token-of-this-cluster", (), "RAY_AUTH_TOKEN", "Invalid authentication token"),
        (None, (), "RAY_AUTH_TOKEN", "RAY_AUTH_MODE is not set"),
        (TOKEN, ("--nnodes", "4"), "cluster.nnodes", "the cluster has 3 such nodes"),
        (TOKEN, ("--cluster.cpus_per_rank", "3"), "cluster.cpus_per_rank", "2 nodes with 6 CPUs each"),
        (TOKEN, ("--cluster.accelerator", "gpu"), "cluster.accelerator", "has no GPU"),
        (TOKEN, ("--launch.ray.entrypoint_num_cpus", "5"), "launch.ray.entrypoint_num_cpus", "no node"),
        (
            TOKEN,
            ("--nnodes", "3", "--tp", "2", "--train.global_batch_size", "6", "--launch.ray.entrypoint_num_cpus", "3"),
            "launch.ray.entrypoint_num_cpus",
            "no room for 3 nodes",
        ),
        (TOKEN, ("--launch.ray.address", "http://10.66.0.12:8265"), "launch.ray.address", "no Ray dashboard answers"),
    ],
    ids=["wrong-token", "no-token", "nodes", "cpus", "gpus", "driver", "driver-and-ranks", "address"],
)
def test_what_is_refused_before_anything_begins(cluster, folder, tmp_path, token, words, key, seen):
    refused = pretrain(cluster, folder, tmp_path / "run", "--json", *words, token=token)
    assert refused.wait(60) == 2, refused.err
    error = json.loads(refused.out)["error"]
    assert error["key"] == key and seen in error["message"] and error["remedy"]
    assert TOKEN not in refused.err and not (tmp_path / "run").exists()


def test_a_driver_that_is_killed(cluster, folder, tmp_path):
    output = tmp_path / "run"
    client = pretrain(cluster, folder, output, *LONG)
    client.until(lambda: step_of(output) >= 3, "step 3")
    drivers = [pid for pid, line in cluster.nodes[0].processes().items() if f"--output={output}" in line]
    for pid in drivers:
        os.kill(pid, signal.SIGKILL)
    assert client.wait(60) == 1
    assert "the job's driver was killed (signal 9)\n  remedy: " in client.err
    cluster.assert_nothing_left()


def test_a_client_that_is_cut_off_then_leaves_and_comes_back(cluster, folder, tmp_path):
    output = tmp_path / "run"
    client = pretrain(cluster, folder, output, *LONG)
    client.until(lambda: "\nstep 1/" in client.err, "the first step")
    cluster.login.set_link(up=False)
    try:
        client.until(lambda: "connection lost, trying again" in client.err, "loss of connection", 60)
        before = step_of(output)
    finally:
        cluster.login.set_link(up=True)
    client.until(lambda: "connected again" in client.err, "connection", 60)
    client.until(lambda: (shown := re.findall(r"^step (\d+)/", client.err, re.M)) and int(shown[-1]) > before, "news")
    steps = re.findall(r"^step (\d+)/", client.err, re.M)
    assert len(steps) == len(set(steps)), "lines came twice"

    client.interrupt()
    assert client.wait(30) == 130
    assert "detached: the job goes on" in client.err and f"swift-dist runs stop {output}" in client.err
    again = pretrain(cluster, folder, output, *LONG)
    assert again.wait(60) == 2 and "in use" in again.err
    follower = cluster.swift_dist(folder, "runs", "logs", str(output), "--follow")
    follower.until(lambda: "rank_0" in follower.out, "the log")
    assert show(cluster, folder, output)["status"] == "running"

    stopped = cluster.swift_dist(folder, "runs", "stop", str(output), "--wait", "60", "--json")
    assert stopped.wait() == 0, stopped.err
    assert json.loads(stopped.out)["status"] == "interrupted"
    assert follower.wait(30) == 0
    now = show(cluster, folder, output)
    assert now["status"] == "interrupted" and now["checkpoints"] == [now["step"]]
    cluster.assert_nothing_left()


@pytest.mark.table
def test_two_jobs_at_once_on_the_same_nodes(cluster, folder, tmp_path):
    """Three nodes have room for 2 x 2 ranks each time; one job ends, the other is stopped while its client looks on."""
    one = pretrain(cluster, folder, tmp_path / "one", "--json")
    two = pretrain(cluster, folder, tmp_path / "two", "--json", *LONG)
    two.until(lambda: step_of(tmp_path / "two") >= 2, "step 2")
    assert one.wait() == 0, one.err
    assert json.loads(one.out)["step"] == STEPS
    asked = cluster.swift_dist(folder, "runs", "stop", str(tmp_path / "two"))
    assert asked.wait() == 0, asked.err
    assert two.wait() == 130, two.err
    result = json.loads(two.out)
    assert result["state"] == "interrupted" and result["checkpoint"] == result["step"] > 0
    hosts = [
        set(json.loads((tmp_path / x / "manifest.json").read_text())["attempts"][-1]["hosts"]) for x in ("one", "two")
    ]
    assert hosts[0] & hosts[1], "they shared no node"
    cluster.assert_nothing_left()


TEN = (0.0, 0.0, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0)


@pytest.mark.parametrize("pauses", [(0.0, 1.0, 4.0), pytest.param(TEN, marks=pytest.mark.table)], ids=len)
def test_submitting_and_stopping_leaves_nothing(cluster, folder, tmp_path, pauses):
    """Stopped at any moment of its start; `runs` knows the job before its run has begun. Ports are the nodes' own."""
    cluster.assert_nothing_left()
    for cycle, pause in enumerate(pauses):
        output = tmp_path / f"run-{cycle}"
        submitted = pretrain(cluster, folder, output, "--launch.ray.follow", "false", "--json", *LONG)
        assert submitted.wait() == 0, submitted.err
        assert json.loads(submitted.out)["submission"]["address"] == cluster.address
        if cycle == 0:
            again = pretrain(cluster, folder, output)
            assert again.wait(60) == 2 and "was submitted as" in again.err
        assert show(cluster, folder, output)["status"] in ("waiting", "running")
        time.sleep(pause)
        stopped = cluster.swift_dist(folder, "runs", "stop", str(output), "--wait", "90")
        assert stopped.wait(120) == 0, stopped.err
        assert show(cluster, folder, output)["status"] == "interrupted"
        if cycle == 0:  # a node's agent opens a port of its own with the first job
            before = [ports(node) for node in cluster.nodes]
    cluster.assert_nothing_left()
    assert list(cluster.scratch.glob("swift_dist*")) == []
    deadline = time.monotonic() + 30  # a worker of Ray's that idles closes its port a moment after its job
    while any(more := [len(ports(node)) - len(old) for node, old in zip(cluster.nodes, before, strict=True)]):
        assert time.monotonic() < deadline, more
        time.sleep(0.5)
    for node in cluster.nodes:
        listing = subprocess.run(
            ["nsenter", "--target", str(node.pid), "--mount", "ls", "/dev/shm"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "swift" not in listing.stdout


@pytest.mark.table
def test_the_page_about_it(cluster, folder):
    """Every command of docs/clusters.md, section Ray, typed as it stands on the login node, with a short job."""
    values = yaml.safe_load((folder / "job.yaml").read_text())
    write_job(folder / "job.yaml", {**values, "train": {**values["train"], "steps": 4}})
    docs = HERE.parents[2] / "docs"
    (section,) = re.findall(r"^## Ray$(.*?)(?=^## |\Z)", (docs / "clusters.md").read_text(), re.DOTALL | re.MULTILINE)
    commands = "".join(re.findall(r"^```bash\n(.*?)^```$", section, re.DOTALL | re.MULTILINE))
    assert commands.count("swift-dist pretrain") == 4
    (folder / "ray-token").write_text(TOKEN)
    (folder / "runtime-env.yaml").write_text((docs / "runtime-env.yaml").read_text())
    typed = cluster.call(folder, "bash", "-exc", commands, token=None)
    assert typed.wait(300) == 0, typed.err + typed.out
    states = {run: show(cluster, folder, folder / "runs" / run)["status"] for run in ("first", "second", "third")}
    assert states == {"first": "done", "second": "interrupted", "third": "done"}


def test_a_node_without_power_is_replaced(cluster, folder, local, tmp_path):
    """The run goes on on the third node and ends the same. (The last test of the file: the node stays off.)"""
    output = tmp_path / "run"
    client = pretrain(cluster, folder, output, "--json")
    client.until(lambda: step_of(output) > INTERVAL, "the first checkpoint")
    (attempt,) = json.loads((output / "manifest.json").read_text())["attempts"]
    lost = next(node for node in cluster.nodes[1:] if node.name in attempt["hosts"])
    lost.end()
    assert client.wait() == 0, client.err
    result = json.loads(client.out)
    assert result["state"] == "done" and result["restarts"] == 1
    (attempt,) = json.loads((output / "manifest.json").read_text())["attempts"]
    assert len(set(attempt["hosts"])) == 2 and lost.name not in attempt["hosts"]
    assert f"lost: {lost.name}; waiting for other nodes" in client.err
    assert_same_end(output, local)
    cluster.assert_nothing_left()
