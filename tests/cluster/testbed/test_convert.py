"""slurm/convert.sbatch as a user submits it, over two nodes of a real Slurm: what it writes, and what it leaves."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import Command

from slurm import JOB_PORTS, Slurm, what_is_missing
from tests.converters.tiny_models import save_tiny_model

pytestmark = [
    pytest.mark.testbed,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(what_is_missing() is not None, reason=str(what_is_missing())),
]
ROOT = Path(__file__).parents[3]
SHARDS = ("--max_shard_size", "40KB", "--dtype", "bf16")


@pytest.fixture(autouse=True)
def _nothing_left(slurm: Slurm) -> Iterator[None]:
    """After every test: no process of a job on any node, no folder of its Ray."""
    yield
    slurm.clear()
    assert list(Path("/tmp").glob("ray-*")) == []


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    save_tiny_model("qwen3", folder, num_hidden_layers=12)
    return folder


@pytest.fixture(scope="module")
def local(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same conversion by processes of this machine."""
    folder = tmp_path_factory.mktemp("local")
    command = Command(["convert", "hf-to-megatron", str(model), str(folder / "out"), *SHARDS], folder)
    assert command.wait() == 0, command.stderr
    return folder / "out"


@pytest.fixture
def submit(slurm: Slurm, tmp_path: Path) -> Callable[..., str]:
    """`sbatch slurm/convert.sbatch WORDS...` with two CPUs a node, in a folder of its own; the job's id."""

    def begin(*words: str, nodes: int = 2) -> str:
        options = ["--parsable", f"--nodes={nodes}", "--cpus-per-task=2", str(ROOT / "slurm/convert.sbatch")]
        env = {"RAY_CLUSTER_PORTS": JOB_PORTS}
        return slurm.run("env", "-C", str(tmp_path), "sbatch", *options, *words, env=env)

    return begin


def until(condition: Callable[[], object], what: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.02)


def end_of(slurm: Slurm, number: str, folder: Path) -> tuple[dict[str, str], str]:
    """The ended job, and its output; its log folder holds no token."""
    ended = slurm.wait(number)
    assert not (folder / f"convert-{number}.d" / "token").exists()
    return ended, (folder / f"convert-{number}.log").read_text()


def state(ended: dict[str, str]) -> tuple[str, ...]:
    return ended["JobState"], ended["ExitCode"], ended["Restarts"]


def assert_same(target: Path, local: Path) -> None:
    """The report's hashes of all tensors, and every weight file."""
    ours, theirs = (json.loads((p / "conversion_report.json").read_text()) for p in (target, local))
    assert ours["files"] == theirs["files"] and len(ours["files"]) >= 6
    for name in ("target_hashes", "source_hashes", "dtype"):
        assert ours[name] and ours[name] == theirs[name]
    for file in ours["files"]:
        assert (target / file).read_bytes() == (local / file).read_bytes()


def test_two_nodes_write_what_one_machine_does_and_both_work(slurm, submit, model, local, tmp_path):
    number = submit("hf-to-megatron", str(model), "out", *SHARDS, "--verify", "--logits", "never")
    ended, log = end_of(slurm, number, tmp_path)
    assert state(ended) == ("COMPLETED", "0:0", "0"), log
    assert_same(tmp_path / "out", local)
    written, compared = (
        [int(done) for done in re.findall(r"(\d+) on \S+ \(2 workers\)", line)]
        for line in re.findall("^units of work: .*", log, re.MULTILINE)
    )
    report = json.loads((tmp_path / "out/conversion_report.json").read_text())
    assert len(written) == 2 and min(written) >= 2 and sum(written) == len(report["files"]), log
    assert len(compared) == 2 and report["verified"]["equal"] and report["verified"]["tensors"] == report["tensors"]
    assert {p.name for p in (tmp_path / f"convert-{number}.d").iterdir()} == {"ray_n1.log", "ray_n2.log"}
    assert {p.name for p in tmp_path.iterdir()} == {"out", f"convert-{number}.log", f"convert-{number}.d"}


def test_requeued_near_its_time_limit_and_cancelled(slurm, submit, model, local, tmp_path):
    """Cancelled while Ray runs on both nodes: nothing runs soon. The same line again, which is sent back into the
    queue while it works, ends the same.
    """
    words = ("hf-to-megatron", str(model), "out", *SHARDS)
    number, partial = submit(*words), tmp_path / ".out.partial"
    until(partial.exists, "conversion")
    assert any("raylet" in line for line in slurm.left())
    slurm.run("scancel", number)
    ended = slurm.wait(number)
    assert ended["JobState"] == "CANCELLED"
    until(lambda: not slurm.left(), "end of all processes", 30)
    assert not (tmp_path / "out").exists()

    number = submit(*words)
    until(lambda: (tmp_path / f"convert-{number}.d/ray_n2.log").exists(), "Ray")
    slurm.run("scancel", "--batch", "--signal=USR1", number)  # as slurmctld does for --signal=B:USR1@120
    ended, log = end_of(slurm, number, tmp_path)
    assert state(ended) == ("COMPLETED", "0:0", "1"), log
    assert log.count("back into the queue") == 1
    assert_same(tmp_path / "out", local)
    assert not partial.exists()


def test_what_is_wrong_is_told_with_the_converter_s_code(slurm, submit, model, tmp_path):
    """On two nodes and on one, and without words."""
    for nodes in (2, 1):
        ended, log = end_of(slurm, submit("hf-to-megatron", "absent", "out", nodes=nodes), tmp_path)
        assert state(ended) == ("FAILED", "2:0", "0")
        assert "swift-dist: source: absent is not a folder" in log and "name a model folder" in log
    ended, log = end_of(slurm, submit(), tmp_path)
    assert state(ended) == ("FAILED", "2:0", "0") and "sbatch convert.sbatch hf-to-megatron SOURCE TARGET" in log
    assert not list(tmp_path.glob("*out*"))


def test_on_one_node_its_processes_do_it(slurm, submit, model, local, tmp_path):
    ended, log = end_of(slurm, submit("hf-to-megatron", str(model), "out", *SHARDS, nodes=1), tmp_path)
    assert state(ended) == ("COMPLETED", "0:0", "0"), log
    assert_same(tmp_path / "out", local)
