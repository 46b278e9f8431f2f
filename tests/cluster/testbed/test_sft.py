"""Fine-tuning on two nodes with two ranks each: through `--launcher ray`, and through the batch scripts by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import nodes
import pytest
import ray_nodes
from commands import Command
from same_end import metrics
from sft_job import STEPS, Files, exported, write_files

from slurm import JOB_PORTS, Slurm, what_is_missing
from swift_dist.runs.folder import RunFolder

pytestmark = [pytest.mark.testbed, pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[3]
NO_RAY = nodes.missing() or ray_nodes.missing()
NO_SLURM = what_is_missing()
STRATEGIES = {
    "zero3": ("--deepspeed", "zero3", "--tuner_type", "lora"),
    "fsdp2": ("--fsdp", "fsdp2", "--tuner_type", "lora"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("sft"))


def words(files: Files, strategy: Sequence[str]) -> list[str]:
    """The job without its ranks and its output; no --json."""
    given = files.words(*strategy)
    at = given.index("--nproc_per_node")
    return [word for word in given[:at] + given[at + 2 :] if word not in ("sft", "--json")]


@pytest.fixture(scope="module")
def local(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same job on two ranks here, under zero3: other strategies train alike."""
    folder = tmp_path_factory.mktemp("local")
    more = ["--nproc_per_node", "2", "--output", str(folder / "run"), "--json"]
    command = Command(["sft", *words(files, STRATEGIES["zero3"]), *more], folder)
    try:
        assert command.wait() == 0, command.stderr
    finally:
        command.kill_everything()
    return folder / "run"


def assert_same_training(output: Path, expected: Path) -> None:
    """Loss, gradient norm and rate of every step to 1e-5, and the final weights as close as Adam leaves them."""
    rows = metrics(output)
    assert [row[0] for row in rows] == list(range(1, STEPS + 1))
    for got, wanted in zip(rows, metrics(expected), strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
    mine, theirs = exported(output), exported(expected)
    assert mine.keys() == theirs.keys()
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-4


@pytest.mark.table
@pytest.mark.skipif(NO_RAY is not None, reason=str(NO_RAY))
def test_zero3_through_ray(files: Files, local: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "work", tmp_path / "there"
    folder.mkdir()
    with ray_nodes.ray_cluster(tmp_path / "net") as cluster:
        place = ["--launcher", "ray", "--launch.ray.address", cluster.address, "--nnodes", "2", "--nproc_per_node", "2"]
        given = [*words(files, STRATEGIES["zero3"]), *place, "--output", str(output), "--json"]
        call = cluster.swift_dist(folder, "sft", *given)
        assert call.wait(400) == 0, call.err
        result = json.loads(call.out)
        assert (result["state"], result["step"], result["restarts"]) == ("done", STEPS, 0)
        assert result["export"] == str(output / "adapter")
        cluster.assert_nothing_left()
    hosts = json.loads((output / "manifest.json").read_text())["attempts"][-1]["hosts"]
    assert len(hosts) == 4 and sorted(hosts.count(host) for host in set(hosts)) == [2, 2]
    assert_same_training(output, local)


@pytest.mark.parametrize("script", ["sft", "sft_long_context"])
@pytest.mark.skipif(NO_SLURM is not None, reason=str(NO_SLURM))
def test_fsdp2_through_a_batch_script(files: Files, local: Path, slurm: Slurm, tmp_path: Path, script: str) -> None:
    """The second lets all four ranks share each row: exchanging heads inside a node, keys going round across nodes."""
    output = tmp_path / "run"
    strategy = STRATEGIES["fsdp2"] if script == "sft" else ("--tuner_type", "lora", "--packing", "false")
    site = ["--nodes=2", "--cpus-per-task=2", "--gres=none", "--exclusive", f"--output={tmp_path}/%j.log"]
    given = [str(ROOT / f"slurm/{script}.sbatch"), str(output), *words(files, strategy)]
    number = slurm.run(
        "env", "-C", str(tmp_path), "sbatch", "--parsable", *site, *given, env={"RAY_CLUSTER_PORTS": JOB_PORTS}
    )
    ended = slurm.wait(number)
    log = (tmp_path / f"{number}.log").read_text()
    assert (ended["JobState"], ended["ExitCode"], ended["NumNodes"]) == ("COMPLETED", "0:0", "2"), log
    assert len(json.loads((output / "manifest.json").read_text())["attempts"][-1]["hosts"]) == 4
    job = RunFolder(output).job()
    assert (job["strategy"]["fsdp"], job["parallel"]["context_parallel_size"], job["train"]["recompute"]) == (
        ("fsdp2", 1, "none") if script == "sft" else ("fsdp2", 4, "full")
    )
    assert_same_training(output, local)
    slurm.clear()
    shutil.rmtree(tmp_path / f"{number}.d", ignore_errors=True)
    assert list(Path("/tmp").glob("ray-*")) == []
