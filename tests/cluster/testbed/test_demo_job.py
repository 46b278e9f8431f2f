"""The demo's job on two nodes of two ranks, the same file through every launcher: the same bits at the end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nodes
import pytest
import ray_nodes
import yaml
from commands import Command
from same_end import assert_same_checkpoint
from toy_job import STEPS, Run

from slurm import JOB_PORTS, Slurm, what_is_missing

ROOT = Path(__file__).parents[3]
_REASON = nodes.missing() or ray_nodes.missing() or what_is_missing()
pytestmark = [
    pytest.mark.testbed,
    pytest.mark.table,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(_REASON is not None, reason=str(_REASON)),
]
PATIENCE = 600.0
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the demo's data, and its job as job.yaml: 40 steps, on 2 nodes with 2 ranks of one thread each."""
    place = tmp_path_factory.mktemp("demo")
    demo = ROOT / "docs" / "demo"
    prepare = ["data", "prepare", "corpus.jsonl", "--tokenizer", "tokenizer", "--append_eod", "--split", "0.98,0.02"]
    for words in (
        [sys.executable, str(demo / "corpus.py"), "corpus.jsonl"],
        [str(BIN / "swift-dist"), "data", "train-tokenizer", "corpus.jsonl", "--vocab_size", "4096",
         "--output", "tokenizer"],
        [str(BIN / "swift-dist"), *prepare, "--output", "code"],
    ):  # fmt: skip
        subprocess.run(words, cwd=place, check=True, capture_output=True)
    job: dict[str, Any] = yaml.safe_load((demo / "job.yaml").read_text())
    job["model"]["tokenizer"] = str(place / "tokenizer")
    job["data"] |= {"train": [str(place / "code_train")], "validation": [str(place / "code_validation")]}
    job["train"] |= {"steps": STEPS, "micro_batch_size": 2, "eval_interval": 20, "precision": "fp32"}
    job["checkpoint"] = {"interval": 20}
    job["parallel"] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    job["cluster"] = {"nnodes": 2, "nproc_per_node": 2, "threads_per_rank": 1, "accelerator": "cpu"}
    (place / "job.yaml").write_text(yaml.safe_dump(job))
    return place


@pytest.fixture(scope="module")
def local(folder: Path) -> Path:
    """The run folder of the local launcher."""
    _here(folder, "local")
    return folder / "local"


def _here(folder: Path, name: str, *words: str) -> None:
    command = Command(["pretrain", str(folder / "job.yaml"), "--output", str(folder / name), "--json", *words], folder)
    try:
        assert command.wait(PATIENCE) == 0, command.stderr
    finally:
        command.kill_everything()


def assert_same(run: Path, local: Path, *more: str) -> None:
    """Losses, gradient norms, evaluations, weights and optimizer to the last bit; the same files in the folder."""
    assert_same_checkpoint(run, Run((), local))
    rows = [[row for row in read(place) if "eval_loss" in row] for place in (run, local)]
    assert [row["eval_loss"] for row in rows[0]] == [row["eval_loss"] for row in rows[1]] and len(rows[1]) == 2
    assert losses(run) == losses(local)
    assert names(run) == names(local) | set(more)
    manifests = [json.loads((place / "manifest.json").read_text()) for place in (run, local)]
    for key in ("versions", "model", "data"):
        assert manifests[0].get(key) == manifests[1].get(key)
    for manifest in manifests:
        (attempt,) = manifest["attempts"]
        assert attempt["threads_per_rank"] == [1] * 4 and len(attempt["hosts"]) == 4


def read(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[Any]:
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in read(run) if "loss" in row]


def names(run: Path) -> set[str]:
    """Of what lies in a run folder, less the launchers' own logs."""
    inside = {f"logs/{p.name}" for p in (run / "logs").iterdir() if not p.name.startswith("torchrun_")}
    return {p.name for p in run.iterdir()} | inside


def test_ray_and_torchrun_on_nodes_with_addresses_of_their_own(folder: Path, local: Path, tmp_path: Path) -> None:
    with ray_nodes.ray_cluster(tmp_path / "net") as cluster:
        sent = cluster.swift_dist(
            folder, "pretrain", "job.yaml", "--launcher", "ray", "--launch.ray.address", cluster.address,
            "--launch.ray.upload", "false", "--output", str(folder / "ray"),
        )  # fmt: skip
        assert sent.wait(PATIENCE) == 0, sent.err
        cluster.assert_nothing_left()
        words = ("pretrain", "job.yaml", "--launcher", "torchrun", "--output", str(folder / "torchrun"))
        typed = [
            ray_nodes.Call(
                node,
                ("swift-dist", *words, "--launch.torchrun.node_rank", str(rank)),
                folder,
                ray_nodes.variables(cluster.scratch),
            )
            for rank, node in enumerate(cluster.nodes[:2])
        ]
        for call in typed:
            assert call.wait(PATIENCE) == 0, call.err
        cluster.assert_nothing_left()
    assert_same(folder / "ray", local, "submission.json")
    assert_same(folder / "torchrun", local)


def test_slurm(slurm: Slurm, folder: Path, local: Path) -> None:
    _here(folder, "slurm", "--launcher", "slurm", "--launch.slurm.ports", JOB_PORTS)
    slurm.clear()
    assert_same(folder / "slurm", local, "submission.json", "slurm")
