"""Through Ray: the whole verb on two simulated nodes, the preflight of a job, and bad nodes left out."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_job import job as toy_job
from toy_job import write_dataset, write_job

from swift_dist.cluster.devices import Devices
from swift_dist.cluster.placement import Demand, Placement
from swift_dist.cluster.runtime import Cluster
from swift_dist.config import JobConfig
from swift_dist.config.job import ClusterSection
from swift_dist.config.load import build
from swift_dist.doctor import preflight as preflight_module
from swift_dist.doctor.examine import all_checks
from swift_dist.doctor.preflight import alive_nodes, bad_nodes, preflight
from swift_dist.doctor.team import RayTeam
from swift_dist.doctor.values import Check, Exam, Facts, Finding, Node, on_node
from swift_dist.errors import JobError, RunError

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

ROOT = Path(__file__).parents[2]
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip


def swift_dist(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-m", "swift_dist.cli", *words], cwd=cwd, env={**variables, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def test_two_healthy_nodes(tmp_path: Path) -> None:
    """The whole verb with a cluster of its own."""
    (tmp_path / "job.yaml").write_text(json.dumps({"model": {"config": MODEL}, "train": {"precision": "fp32"}}))
    nodes = ["--cluster.nnodes", "2", "--cluster.nproc_per_node", "2", "--cluster.accelerator", "cpu"]
    done = swift_dist("doctor", "--job", "job.yaml", *nodes, "--json", cwd=tmp_path)
    result = json.loads(done.stdout)
    assert done.returncode == 0 and result["healthy"] and result["exit_code"] == 0, done.stdout + done.stderr
    assert len(result["nodes"]) == 2
    found = {finding["check"]: finding for finding in result["findings"]}
    assert set(found) == set(all_checks())
    assert "1 pair of nodes: all-reduce " in found["network"]["found"] and "; 4 ranks: " in found["network"]["found"]
    assert "what each of 2 nodes wrote, all read" in found["shared_folder"]["found"]
    assert sum(result["check_seconds"][name] for name in result["check_seconds"] if all_checks()[name].short) < 150
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]
    print(result["seconds"], result["check_seconds"])


def test_what_is_bad_ends_the_verb_with_1_and_a_table(tmp_path: Path) -> None:
    words = ["--cluster.accelerator", "gpu", "--cluster.nproc_per_node", "2", "--checks", "gpus", "names"]
    done = swift_dist("doctor", *words, cwd=tmp_path)
    if "0 of the 2 GPUs" not in done.stdout:
        pytest.skip("this machine has GPUs")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0].startswith("bad   gpus ") and lines[1].strip().startswith("-> a GPU may have fallen off")
    assert (
        lines[2].startswith("ok    names") and lines[3].startswith("1 node in ") and "1 bad, 0 to look at" in lines[3]
    )


def test_a_launcher_without_ray_looks_at_this_node(tmp_path: Path) -> None:
    words = ["--launcher", "torchrun", "--cluster.nnodes", "2", "--checks", "clock", "shared_folder"]
    done = swift_dist("doctor", *words, cwd=tmp_path)
    assert done.returncode == 0 and "1 node in" in done.stdout and "run it once on each node" in done.stdout
    wrong = swift_dist("doctor", "--launcher", "torchrum", cwd=tmp_path)
    assert wrong.returncode == 2 and "did you mean torchrun?" in wrong.stderr


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three simulated nodes."""
    saved = {name: os.environ.get(name) for name in ("PYTHONPATH", "RAY_ADDRESS", "RAY_AUTH_MODE")}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    os.environ.pop("RAY_ADDRESS", None)
    with Cluster(ClusterSection(nnodes=3, nproc_per_node=1, accelerator="cpu")) as running:
        running.start(Devices(use_gpu=False, nproc_per_node=1))
        running.connect()
        yield running
    for name, value in saved.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def job(output: Path, **cluster: Any) -> JobConfig:
    settings = {"nnodes": 2, "nproc_per_node": 1, "accelerator": "cpu", **cluster}
    return build(JobConfig, [{"model.config": MODEL, "output": str(output), "cluster": settings}])


def test_a_job_of_two_nodes_on_a_full_disk_ends_before_it_begins(tmp_path: Path, tmpfs: Callable[..., Path]) -> None:
    disk = tmpfs("disk", "size=1m")
    data = write_dataset(tmp_path / "toy")
    nodes = {"nnodes": 2, "nproc_per_node": 1, "accelerator": "cpu"}
    file = write_job(tmp_path / "job.yaml", toy_job(data, cluster=nodes))
    done = swift_dist("pretrain", file, "--output", str(disk / "run"), "--json", cwd=tmp_path)
    error = json.loads(done.stdout)
    assert (done.returncode, error["exit_code"], error["error"]["kind"]) == (1, 1, "run"), done.stderr
    assert "the nodes are not fit for this job:\nspace, all: " in error["error"]["message"]
    assert "--cluster.preflight false" in error["error"]["remedy"]
    assert list(disk.iterdir()) == []


DEMAND = Demand(nnodes=2, ranks=1, cpus=1, gpus=0)


def test_the_preflight_of_healthy_nodes(cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "swift_dist.doctor")
    with Placement(DEMAND, 100) as placement:
        began = time.monotonic()
        preflight(job(tmp_path), placement.node_ids, simulated=True)
        seconds = time.monotonic() - began
    print(f"preflight {seconds:.1f} s; {caplog.text}")
    assert seconds < 100
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []
    assert list(tmp_path.iterdir()) == []


def test_the_preflight_ends_a_job_on_a_full_disk(cluster: Cluster, tmpfs: Callable[..., Path]) -> None:
    disk = tmpfs("disk", "size=1m")
    with Placement(DEMAND, 20) as placement, pytest.raises(RunError) as caught:
        preflight(job(disk), placement.node_ids, simulated=True)
    # 1.0 MiB or a little less in KiB: another check may have a file there at that moment
    assert "space, all: 1" in caught.value.message and "checkpoint.keep" in caught.value.message
    assert "--cluster.preflight false" in caught.value.remedy


def _judge_name(facts: Facts, exam: Exam) -> list[Finding]:
    return [on_node("mine", node, "bad", f"{node} is cursed", "leave it") for node in facts if node.endswith("#1")]


def _common(facts: Facts, exam: Exam) -> list[Finding]:
    return [Finding("mine", "all", "bad", "nothing works", "give up")]


def _names(team: Any) -> Facts:
    return {node.name: None for node in team.nodes}


def test_ranks_go_to_good_nodes_only(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    sick = Check(_judge_name, _names, short=True)
    monkeypatch.setattr(preflight_module, "all_checks", lambda short: {**all_checks(short=short), "mine": sick})
    avoid = bad_nodes(job(tmp_path), DEMAND)
    ids = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    assert len(avoid) == 1 and avoid < set(ids)
    for _ in range(3):
        with Placement(DEMAND, 20, avoid) as placement:
            assert set(placement.node_ids) == set(ids) - avoid
    with pytest.raises(RunError, match=r"2 good nodes are left, 3 are needed\nmine, .*#1 is cursed \(leave it\)"):
        bad_nodes(job(tmp_path), Demand(nnodes=3, ranks=1, cpus=1, gpus=0))
    with pytest.raises(JobError, match="needs 3 nodes"):
        Placement(Demand(nnodes=3, ranks=1, cpus=1, gpus=0), 5, avoid)


def test_what_is_wrong_with_no_node_excludes_none(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight_module, "all_checks", lambda short: {"mine": Check(_common, _names)})
    with pytest.raises(RunError, match="nothing works"):
        bad_nodes(job(tmp_path), DEMAND)


def test_exclusion_without_the_preflight_is_refused() -> None:
    with pytest.raises(JobError, match="exclude_bad_nodes needs the preflight"):
        build(JobConfig, [{"cluster.exclude_bad_nodes": True, "cluster.preflight": False}])


def test_a_node_that_is_gone_is_named(cluster: Cluster, tmp_path: Path) -> None:
    there = alive_nodes()[0]
    gone = Node("gone", there.address, "ab" * 28, {"CPU": 1.0})
    team = RayTeam([there, gone], Exam("t", str(tmp_path)), time.monotonic() + 60, reach_seconds=25)
    try:
        (finding,) = team.unreached
        assert (finding.check, finding.node, finding.level) == ("reach", "gone", "bad")
        assert "runs nothing for us" in finding.found and "raylet's log" in finding.advice
        assert [node.name for node in team.nodes] == [there.name]
    finally:
        team.close()
