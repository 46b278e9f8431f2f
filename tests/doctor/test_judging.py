"""What facts mean, for what cannot be brought about on one machine: pure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swift_dist.config.job import JobConfig
from swift_dist.config.load import build
from swift_dist.doctor.checks import clock, cpus, gpus, limits, names, network, shared_folder, shared_memory, versions
from swift_dist.doctor.values import Answer, Exam, Finding
from swift_dist.doctor.wanted import checkpoint_bytes, exam_of, num_checkpoints

DRIVER = {"python": "3.11.7", "swift-dist": "0.1.0", "torch": "2.13.0", "ray": "2.60.0", "numpy": "2.3.0"}


def exam(**settings: Any) -> Exam:
    return Exam(**{"token": "t", "folder": "/share", "versions": DRIVER, **settings})


def by_node(findings: list[Finding]) -> dict[str, Finding]:
    assert len({f.node for f in findings}) == len(findings)
    return {finding.node: finding for finding in findings}


def test_version_skew() -> None:
    facts = {
        "n1": DRIVER,
        "n2": {**DRIVER, "torch": "2.12.1", "nccl": "2.28.3"},
        "n3": {**DRIVER, "numpy": "2.2.0", "nccl": "2.28.9"},
        "n4": {**DRIVER, "nccl": "2.28.9"},
        "n5": {name: value for name, value in DRIVER.items() if name != "swift-dist"} | {"nccl": "2.28.9"},
    }
    found = by_node(versions.judge(facts, exam()))
    assert set(found) == {"n1", "n2", "n3", "n5"}
    assert found["n1"].level == "bad" and "nccl none (wanted: 2.28.9)" in found["n1"].found
    assert found["n2"].level == "bad" and "torch 2.12.1 (wanted: 2.13.0)" in found["n2"].found
    assert "pip install" in found["n2"].advice and "torch==2.13.0" in found["n2"].advice
    assert found["n3"].level == "warn" and found["n3"].found == "numpy 2.2.0 (wanted: 2.3.0)"
    assert found["n5"].level == "bad" and "swift-dist none" in found["n5"].found
    assert [f.level for f in versions.judge({"n1": DRIVER, "n2": DRIVER}, exam())] == ["ok"]


def test_a_driver_without_gpu_may_have_another_build_of_torch() -> None:
    on_gpu = {**DRIVER, "torch": "2.13.0+cu130", "nccl": "2.28.9", "transformer-engine": "2.20.0"}
    here = exam(versions={**DRIVER, "torch": "2.13.0+cpu"})
    assert [f.level for f in versions.judge({"n1": on_gpu, "n2": on_gpu}, here)] == ["ok"]
    older = {**on_gpu, "torch": "2.12.1+cu130"}
    found = by_node(versions.judge({"n1": older, "n2": older}, here))
    assert {f.level for f in found.values()} == {"bad"} and set(found) == {"n1", "n2"}
    (without,) = versions.judge({"n1": on_gpu, "n2": on_gpu, "n3": {**on_gpu, "torch": "2.13.0+cpu"}}, here)
    assert without.node == "n3" and "torch 2.13.0+cpu (wanted: 2.13.0+cu130)" in without.found


def test_a_driver_that_computes_too_fixes_every_build() -> None:
    here = exam(versions={**DRIVER, "nccl": "2.28.9"}, driver_computes=True)
    assert [f.level for f in versions.judge({"n2": {**DRIVER, "nccl": "2.28.9"}}, here)] == ["ok"]
    for other in ({}, {"nccl": "2.28.3"}, {"nccl": "2.28.9", "transformer-engine": "2.20.0"}):
        (found,) = versions.judge({"n2": {**DRIVER, **other}}, here)
        assert found.level == "bad" and ("nccl" in found.found or "transformer-engine" in found.found)


def test_another_python_is_not_something_to_install() -> None:
    (found,) = versions.judge({"n1": {**DRIVER, "python": "3.12.1"}}, exam())
    assert found.level == "bad" and found.advice == "use the driver's Python there"


class SkewedTeam:
    """Nodes whose clocks are off by so much, and whose answers take long to come."""

    def __init__(self, offsets: dict[str, float]) -> None:
        self.offsets, self.pauses = offsets, iter([0.2, 0.0, 0.15, 0.3, 0.1, 0.2])
        self.now = 1_000_000.0  # of a clock of its own: on a busy machine any answer may take longer

    def ask(self, function: Any) -> dict[str, Answer]:
        assert function is clock.observe
        sent = self.now
        self.now += next(self.pauses)  # a node's clock is read at once; the answer is late
        return {node: Answer(sent + off, "", sent, self.now) for node, off in self.offsets.items()}

    def values(self, function: Any) -> dict[str, Any]:
        return {node: answer.value for node, answer in self.ask(function).items()}


def test_a_wrong_clock_is_measured_despite_slow_answers() -> None:
    facts = clock.examine(SkewedTeam({"n1": 0.0, "n2": 90.0, "n3": -1.5, "n4": 0.3}))  # type: ignore[arg-type]
    assert [facts[node]["offset"] for node in ("n2", "n3")] == pytest.approx([90, -1.5], abs=0.05)
    found = by_node(clock.judge(facts, exam()))
    assert set(found) == {"n2", "n3"}
    assert found["n2"].level == "bad" and " s ahead of the driver's" in found["n2"].found
    assert found["n3"].level == "warn" and "1.50 s behind the driver's clock" in found["n3"].found
    assert "chrony" in found["n2"].advice


def test_a_clock_that_could_not_be_measured_well_is_not_blamed() -> None:
    (found,) = clock.judge({"n1": {"offset": 3.0, "error": 2.9}}, exam())
    assert found.level == "ok"


def test_cpus_of_an_allocation_against_rays_books() -> None:
    node = {"affinity": 4, "quota": None, "machine": 64, "ray": 64.0}
    (over,) = cpus.judge({"n1": node}, exam(cpus=4))
    assert over.level == "warn" and "Ray believes in 64 CPUs, but its processes may use 4 of" in over.found
    assert "--num-cpus 4" in over.advice
    (hang,) = cpus.judge({"n1": {**node, "ray": 1.0}}, exam(cpus=4))
    assert hang.level == "bad" and "Ray has 1 CPUs there, the job asks 4: it would wait for ever" in hang.found
    assert "--cpus-per-task" in hang.advice
    (few,) = cpus.judge({"n1": {**node, "ray": None, "quota": 2.5}}, exam(ranks=4))
    assert few.level == "warn" and "4 ranks share 2 CPUs" in few.found
    assert [f.level for f in cpus.judge({"n1": {**node, "ray": 4.0}}, exam(cpus=4, ranks=4))] == ["ok"]


def test_cgroup_quotas(tmp_path: Path) -> None:
    inner = tmp_path / "slurm" / "job_1" / "step_0"
    inner.mkdir(parents=True)
    (inner / "cpu.max").write_text("max 100000\n")
    (inner.parent / "cpu.max").write_text("250000 100000\n")
    assert cpus.quota("0::/slurm/job_1/step_0\n", tmp_path) == 2.5
    (inner.parent / "cpu.max").unlink()
    assert cpus.quota("0::/slurm/job_1/step_0\n", tmp_path) is None
    old = tmp_path / "cpu,cpuacct" / "docker" / "x"
    old.mkdir(parents=True)
    (old / "cpu.cfs_quota_us").write_text("400000\n")
    (old / "cpu.cfs_period_us").write_text("100000\n")
    assert cpus.quota("4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n", tmp_path) == 4.0


def test_gpus_that_differ() -> None:
    eight = {"files": 8, "library": 8, "visible": None, "ray": 8}
    found = by_node(gpus.judge({"n1": eight, "n2": {**eight, "library": 7}, "n3": {**eight, "ray": 4}}, exam(gpus=8)))
    assert found["n2"].level == "bad" and "finds 7 of 8 GPUs" in found["n2"].found and "Xid 79" in found["n2"].advice
    assert found["n3"].level == "bad" and found["n3"].found == "4 of the 8 GPUs that are needed"
    assert "--num-gpus" in found["n3"].advice
    (fewer,) = gpus.judge({"n1": eight, "n2": {**eight, "files": 6, "library": 6, "ray": 6}}, exam(gpus=4))
    assert fewer.level == "warn" and fewer.found == "6 GPUs; other nodes have 8"


def test_small_shared_memory() -> None:
    found = by_node(
        shared_memory.judge(
            {"n1": {"size": 64 * 2**20, "free": 64 * 2**20}, "n2": {"size": 2**34, "free": 2**29},
             "n3": {"size": 2**34, "free": 2**33}},
            exam(),
        )
    )  # fmt: skip
    assert set(found) == {"n1", "n2"}
    assert found["n1"].level == "bad" and "--shm-size" in found["n1"].advice
    assert found["n2"].level == "warn" and "remove what dead processes left" in found["n2"].advice


def test_limits_of_infiniband_and_core_files() -> None:
    node = {"files": 65535, "memlock": 8 * 2**20, "core": 0, "core_is_piped": False, "infiniband": True}
    (locked,) = limits.judge({"n1": node}, exam())
    assert (
        locked.level == "bad" and "8.0 MiB of locked memory" in locked.found and "ulimit -l unlimited" in locked.advice
    )
    (core,) = limits.judge({"n1": {**node, "memlock": -1, "core": -1}}, exam())
    assert core.level == "warn" and "writes all of its memory" in core.found
    assert [f.level for f in limits.judge({"n1": {**node, "memlock": -1}}, exam())] == ["ok"]


def test_slow_and_missing_names() -> None:
    node = {"host": "n1", "address": "10.0.0.1", "forward_seconds": 0.0, "reverse_seconds": 0.001}
    facts = {"n1": {**node, "reverse_seconds": 10.0}, "n2": {**node, "host": "n2", "address": None}}
    found = by_node(names.judge(facts, exam()))
    assert found["n1"].level == "bad" and "reverse look-up of its own name took 10.0 s" in found["n1"].found
    assert "/etc/resolv.conf" in found["n1"].advice
    assert found["n2"].level == "warn" and "/etc/hosts" in found["n2"].advice
    (twins,) = names.judge({"n1": node, "n2": node}, exam())
    assert twins.level == "warn" and "2 nodes call themselves n1" in twins.found
    assert [f.level for f in names.judge({"n1": node, "n2": node}, exam(simulated=True))] == ["ok"]


def test_the_node_without_the_share_is_named_not_its_peers() -> None:
    facts = {
        "n1": {"write": None, "unread": {"n3": "No such file"}},
        "n2": {"write": None, "unread": {"n3": "No such file"}},
        "n3": {"write": None, "unread": {"n1": "No such file", "n2": "No such file"}},
    }
    (found,) = shared_folder.judge(facts, exam())
    assert (found.node, found.level) == ("n3", "bad") and "was written on n1 (No such file), n2" in found.found
    assert "mount the same file system at /share on every node" in found.advice


def speeds(**pairs: float) -> dict[str, Any]:
    measured = {
        pair.replace("_", "+"): {"all_reduce": value, "all_to_all": value, "latency": 1e-4}
        for pair, value in pairs.items()
    }
    return {"pairs": measured, "all": None, "unmeasured": 0, "ranks": 4}


def test_a_slow_pair_stands_out() -> None:
    facts = speeds(n1_n2=1e9, n1_n3=1.1e9, n1_n4=1e9, n2_n3=0.4e9, n2_n4=1e9, n3_n4=0.9e9)
    found = by_node(network.judge(facts, exam()))
    assert found["n2+n3"].level == "warn" and found["n2+n3"].nodes == ("n2", "n3")
    assert "400.0 MB/s; a good pair has 1.00 GB/s" in found["n2+n3"].found and "ethtool" in found["n2+n3"].advice
    facts["pairs"]["n2+n3"]["all_to_all"] = 0.1e9
    assert by_node(network.judge(facts, exam()))["n2+n3"].level == "bad"
    assert [f.level for f in network.judge(facts, exam(simulated=True))] == ["ok"]


def test_a_slow_node_among_three() -> None:
    found = by_node(network.judge(speeds(n1_n2=1e9, n1_n3=0.1e9, n2_n3=0.1e9), exam()))
    assert set(found) == {"n3"} and found["n3"].level == "bad"


def test_a_slow_node_is_named_once() -> None:
    facts = speeds(n1_n2=1e9, n1_n3=1e9, n1_n4=0.1e9, n2_n3=1e9, n2_n4=0.11e9, n3_n4=0.12e9)
    found = network.judge(facts, exam())
    assert [(f.node, f.level) for f in found] == [("n4", "bad")]
    assert "is slow with every other node: all-to-all 100.0 MB/s; a good pair has 1.00 GB/s" in found[0].found


def test_two_nodes_are_held_against_a_bound() -> None:
    assert [f.level for f in network.judge(speeds(n1_n2=40e6), exam())] == ["warn", "ok"]
    assert [f.level for f in network.judge(speeds(n1_n2=5e6), exam())] == ["bad"]
    assert [f.level for f in network.judge(speeds(n1_n2=110e6), exam())] == ["ok"]


def test_who_reaches_nobody_is_not_blamed_on_its_peers() -> None:
    facts = speeds(n1_n2=1e9)
    facts["pairs"] |= {"n1+n3": {"error": "timed out"}, "n2+n3": {"error": "timed out"}}
    (found,) = network.judge(facts, exam())
    assert (found.node, found.level) == ("n3", "bad") and "reached by no other node: timed out" in found.found
    assert "GLOO_SOCKET_IFNAME" in found.advice
    (all_of_them,) = network.judge({**speeds(n1_n2=1e9), "all": {"error": "timed out"}}, exam())
    assert "pairs of nodes reach each other, but 4 ranks together do not" in all_of_them.found


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8])
def test_everyone_meets_everyone_once(count: int) -> None:
    everyone = [f"n{i}" for i in range(count)]
    rounds = network.tournament(everyone)
    assert sorted(pair for group in rounds for pair in group) == sorted(_pairs(everyone))
    for group in rounds:
        busy = [node for pair in group for node in pair]
        assert len(set(busy)) == len(busy)


def _pairs(everyone: list[str]) -> Iterator[tuple[str, str]]:
    return ((a, b) for a in everyone for b in everyone if a < b)


GEOMETRY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip


def job(**values: Any) -> JobConfig:
    return build(JobConfig, [{"model.config": GEOMETRY, **{k.replace("__", "."): v for k, v in values.items()}}])


def test_bytes_of_a_checkpoint() -> None:
    parameters = 180_800  # of this geometry; the factors were measured on real checkpoints (see the docstring)
    assert checkpoint_bytes(job(train__precision="fp32")) == 12 * parameters
    assert checkpoint_bytes(job(train__precision="bf16")) == 14 * parameters
    assert checkpoint_bytes(job(train__precision="bf16", optimizer__name="sgd")) == 10 * parameters
    assert checkpoint_bytes(JobConfig()) == 0


@pytest.mark.parametrize(
    ("steps", "interval", "keep", "keep_every", "most"),
    [
        (100, 0, 2, 0, 1),
        (100, 10, 2, 0, 3),
        (10, 5, 5, 0, 2),
        (100, 10, 2, 20, 8),
        (None, 10, 3, 0, 4),
        (100, 10, 2, 5, 10),
    ],
)
def test_checkpoints_at_once(steps: int | None, interval: int, keep: int, keep_every: int, most: int) -> None:
    settings = {"train__steps": steps, "checkpoint__interval": interval}
    assert num_checkpoints(job(**settings, checkpoint__keep=keep, checkpoint__keep_every=keep_every)) == most


def test_secrets_do_not_travel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_hidden")
    monkeypatch.setenv("WANDB_API_KEY", "hidden")
    monkeypatch.setenv("HF_HOME", "/somewhere")
    wanted = exam_of(job(output=str(tmp_path), cluster__env={"WANDB_MODE": "offline"}), [], nnodes=1, simulated=False)
    assert "hidden" not in repr(wanted)
    assert (wanted.variables["HF_TOKEN"], wanted.variables["HF_HOME"]) == ("set", "/somewhere")
    assert wanted.variables["WANDB_MODE"] == "offline" and wanted.folder == str(tmp_path)
    assert wanted.bands["torchrun"] == (23000, 23999) and wanted.bands["slurm"] == (24000, 31999)
    wanted = exam_of(job(launch__slurm={"ports": "40000-40063"}), [], nnodes=1, simulated=False)
    assert wanted.bands["slurm"] == (40000, 40063)
