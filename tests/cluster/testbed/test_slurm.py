"""Whole jobs through a real Slurm of three nodes on this machine: what happens to them there, they end the same."""

from __future__ import annotations

import json
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from same_end import assert_same_end
from toy_job import STEPS, job, write_job

from slurm import JOB_PORTS, Slurm, what_is_missing

pytestmark = [
    pytest.mark.testbed,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(what_is_missing() is not None, reason=str(what_is_missing())),
]
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _nothing_left(slurm: Slurm) -> Iterator[None]:
    """After every test: no process of a job on any node, no folder of its Ray."""
    yield
    slurm.clear()
    assert list(Path("/tmp").glob("ray-*")) == []


@pytest.fixture
def submit(slurm: Slurm, two_node_job: str, tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """`swift-dist ... --launcher slurm` as a child that follows its job."""
    commands: list[Command] = []

    def begin(*more: str) -> Command:
        given = ["--output", str(tmp_path / "run"), "--launcher", "slurm", "--launch.slurm.ports", JOB_PORTS]
        commands.append(Command(["pretrain", two_node_job, "--json", *given, *more], tmp_path))
        return commands[-1]

    yield begin
    for command in commands:
        command.kill_everything()


def number_of(command: Command, run: Path) -> str:
    """The id of the job that a command submitted."""
    noted = command.until(lambda: (run / "submission.json").exists() and (run / "submission.json").read_text(), "job")
    return str(json.loads(noted)["id"])


def attempts(run: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads((run / "manifest.json").read_text())["attempts"])
    except (OSError, ValueError):
        return []


def in_attempt(slurm: Slurm, command: Command, run: Path, number: int) -> None:
    """Wait until that attempt has made steps of its own."""
    first: list[int] = []

    def far_enough() -> bool:
        slurm.let_go()
        if len(attempts(run)) < number:
            return False
        step = json.loads((run / "status.json").read_text())["step"]
        first.append(step)
        return bool(step > first[0] + 1)

    command.until(far_enough, f"steps of attempt {number}", pause=0.1)
    assert len(attempts(run)) == number


def names(run: Path) -> set[str]:
    return {p.name for p in run.iterdir()} | {f"logs/{p.name}" for p in (run / "logs").iterdir()}


@pytest.mark.table
def test_two_nodes_end_as_on_one_machine(slurm, submit, local, tmp_path):
    command = submit()
    assert command.wait() == 0, command.stderr
    run = tmp_path / "run"
    assert_same_end(run, local)
    assert command.result()["step"] == STEPS and command.result()["output"] == str(run)
    assert f"step {STEPS}/{STEPS}" in command.stderr  # its output was followed
    assert names(run) - names(local.output) == {"submission.json", "slurm"}
    assert names(local.output) <= names(run)
    number = number_of(command, run)
    assert slurm.job(number)["ExitCode"] == "0:0"
    left = {p.name for p in (run / "slurm" / f"{number}.d").iterdir()}
    assert left == {"ray_n1.log", "ray_n2.log", "result.json"}  # no token


ALL = ("preempted", "near its time limit", "requeued from outside")


@pytest.mark.parametrize("before", [(), pytest.param(ALL, marks=pytest.mark.table)], ids=len)
def test_what_is_requeued_again_and_again_ends_the_same(slurm, submit, local, tmp_path, before):
    """One job loses a node; in the table it is preempted, near its time limit, and requeued from outside before."""
    command, run = submit("--launch.slurm.partition", "low"), tmp_path / "run"
    number = number_of(command, run)
    preempting = ("sbatch", "--parsable", "-p", "high", "-N3", "--exclusive", "-o/dev/null", "--wrap", "sleep 1")
    disturb = {
        "preempted": lambda: slurm.wait(slurm.run(*preempting)),
        # as slurmctld does for --signal=B:USR1@120
        "near its time limit": lambda: slurm.run("scancel", "--batch", "--signal=USR1", number),
        "requeued from outside": lambda: slurm.run("scontrol", "requeue", number),
    }
    for attempt, what in enumerate(before, 1):
        in_attempt(slurm, command, run, attempt)
        disturb[what]()
    in_attempt(slurm, command, run, len(before) + 1)
    slurm.lose_node("n2")
    try:
        ended = slurm.wait(number)
    finally:
        slurm.start_node("n2")
        slurm.until_idle()
    assert command.wait() == 0, command.stderr
    restarts = str(len(before) + 1)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", restarts)
    assert ended["NodeList"] == "n[1,3]"
    assert_same_end(run, local)
    states = [attempt["state"] for attempt in attempts(run)]
    asked = min(len(before), 2)  # for a checkpoint, and they wrote one
    assert states[:asked] == ["interrupted"] * asked and states[-1] == "done" and len(states) == len(before) + 2
    log = (run / "slurm" / f"{number}.log").read_text()
    assert log.count("USR1: asking the driver to checkpoint and end") == asked
    assert log.count("a node is lost: back into the queue") <= 1  # or Slurm saw it first
    assert names(run) - names(local.output) == {"submission.json", "slurm"}
    left = {p.name for p in (run / "slurm" / f"{number}.d").iterdir()}
    assert left == {"ray_n1.log", "ray_n2.log", "ray_n3.log", "result.json"}  # no token


@pytest.mark.table
def test_stop_checkpoints_and_the_same_command_goes_on(slurm, submit, local, tmp_path):
    from swift_dist.launchers._base import Submission
    from swift_dist.launchers.slurm import LAUNCHER

    command, run = submit(), tmp_path / "run"
    number = number_of(command, run)
    again = submit()
    assert again.wait() == 2 and f"is Slurm job {number}'s, which is " in again.stderr
    in_attempt(slurm, command, run, 1)
    noted = json.loads((run / "submission.json").read_text())
    handle = LAUNCHER.attach(Submission(noted["launcher"], noted["id"], noted["address"]))
    assert handle.status() == "running"
    handle.stop()
    assert command.wait() == 130, command.stderr
    stopped = command.result()
    assert stopped["state"] == "interrupted" and stopped["checkpoint"] == stopped["step"] < STEPS
    assert handle.status() == "interrupted" and slurm.job(number)["ExitCode"] == "130:0"
    assert handle.wait() == stopped
    command = submit()
    assert command.wait() == 0, command.stderr
    assert_same_end(run, local)


def script(slurm: Slurm, folder: Path, command: str, *options: str, **settings: str) -> str:
    """Submit a hand-written batch script of two nodes; its id."""
    folder.mkdir(exist_ok=True)
    lines = ["#!/bin/bash", f"RAY_CLUSTER_PORTS={JOB_PORTS}", *(f"{k}={v}" for k, v in settings.items())]
    lines += [f"source {ROOT}/slurm/ray_cluster.sh", f"ray_cluster_run {command}"]
    file = folder / "script"
    file.write_text("\n".join(lines))
    words = ["-N2", "--ntasks-per-node=1", "--cpus-per-task=2", f"--output={folder}/%j.log", "--requeue", *options]
    return slurm.run("sbatch", "--parsable", *words, str(file))


DRIVER = """
    import os, sys, ray
    ray.init(log_to_driver=False)
    have = ray.cluster_resources()
    print("CPUs", have["CPU"], "GPUs", have.get("GPU", 0), flush=True)

    @ray.remote(num_gpus=1, num_cpus=2, scheduling_strategy="SPREAD")
    def see():
        return os.environ["CUDA_VISIBLE_DEVICES"], sorted(n for n in os.environ if n.startswith("SLURM"))

    print(ray.get([see.remote(), see.remote()]), flush=True)
    sys.exit(9)
"""


def test_exit_code_cpus_gpus_and_token_beside_another_job(slurm, tmp_path):
    """Two jobs at once on the same two nodes."""
    driver = tmp_path / "driver.py"
    driver.write_text(textwrap.dedent(DRIVER))
    one, two = (script(slurm, tmp_path / name, f"python {driver}", "--gres=gpu:1", "--nodelist=n1,n2") for name in "ab")
    for number, folder in ((one, tmp_path / "a"), (two, tmp_path / "b")):
        ended = slurm.wait(number)
        log = (folder / f"{number}.log").read_text()
        assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "9:0"), log
        assert "CPUs 4.0 GPUs 2.0" in log and "'), []" not in log
        visible = "0" if number == one else "1"
        assert f"[('{visible}', []), ('{visible}', [])]" in log  # each job the GPU that Slurm gave it


def test_a_dead_node_ends_the_job_at_once_and_an_absent_one_at_the_deadline(slurm, tmp_path):
    dead = script(slurm, tmp_path / "dead", "bash -c 'touch started; sleep 300'", f"--chdir={tmp_path}")
    late = script(slurm, tmp_path / "late", "true", RAY_CLUSTER_JOIN_SECONDS="0")
    ended = slurm.wait(late)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "72:0")
    assert "of 2 nodes joined" in (tmp_path / "late" / f"{late}.log").read_text()
    began = time.monotonic()
    while not (tmp_path / "started").exists():
        assert time.monotonic() - began < 120
        time.sleep(0.1)
    slurm.kill_on("n2", "raylet")
    began = time.monotonic()
    ended = slurm.wait(dead)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "73:0", "0")
    assert time.monotonic() - began < 45
    assert "Ray ended on a node" in (tmp_path / "dead" / f"{dead}.log").read_text()


def test_restarts_are_limited(slurm, tmp_path):
    """At the limit USR1 still checkpoints, and the job ends as interrupted."""
    command = "bash -c 'touch started; trap \"exit 130\" TERM; for i in {1..999}; do sleep 0.2; done'"
    number = script(slurm, tmp_path / "x", command, f"--chdir={tmp_path}", RAY_CLUSTER_MAX_RESTARTS="0")
    began = time.monotonic()
    while not (tmp_path / "started").exists():
        assert time.monotonic() - began < 120
        time.sleep(0.1)
    environment = tmp_path / "x" / f"{number}.d"
    assert (environment / "token").stat().st_mode & 0o777 == 0o600
    attached = slurm.run(
        "bash", str(ROOT / "slurm/attach.sh"), number, "n2", "python", "-c",
        "import ray; ray.init(); print('nodes', len(ray.nodes()))",
    )  # fmt: skip
    assert "nodes 2" in attached
    slurm.run("scancel", "--batch", "--signal=USR1", number)
    ended = slurm.wait(number)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "130:0", "0")


def test_chain_and_array_by_hand(slurm, tmp_path):
    """slurm/*.sbatch as a user runs them: text -> dataset -> model -> export, and an array of two seeds."""
    from swift_dist.launchers.slurm import ray_cluster

    assert ray_cluster() == (ROOT / "slurm/ray_cluster.sh").read_text()
    (tmp_path / "text.txt").write_text("\n".join(f"the {n}th line of a short text" for n in range(2000)))
    subprocess.run(
        ["swift-dist", "data", "train-tokenizer", "text.txt", "--vocab_size", "300", "--output", "tokenizer"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    values = job(
        str(tmp_path / "data"),
        train={"steps": 4},
        cluster={"accelerator": "cpu", "threads_per_rank": 1, "max_failures": 0},
    )
    values["model"]["config"] = {**values["model"]["config"], "vocab_size": 384}
    write_job(tmp_path / "job.yaml", values)
    env = {"RAY_CLUSTER_PORTS": JOB_PORTS, "PREPARE": "--cpus-per-task=2", "EXPORT": "--cpus-per-task=2",
           "PRETRAIN": "--nodes=1 --cpus-per-task=2 --gres=none"}  # fmt: skip
    chain = ["env", "-C", str(tmp_path), "bash", str(ROOT / "slurm/chain.sh"), "job.yaml", "run"]
    prepare = ["text.txt", "--text_unit", "line", "--tokenizer", "tokenizer", "--output", "data"]
    jobs = dict(line.split() for line in slurm.run(*chain, *prepare, env=env).splitlines())
    states = {name: slurm.wait(number)["JobState"] for name, number in jobs.items()}
    assert states == dict.fromkeys(("prepare", "pretrain", "export"), "COMPLETED"), _logs(tmp_path)
    assert (tmp_path / "run/hf/config.json").exists()

    array = ["--array=1-2", *env["PRETRAIN"].split(), str(ROOT / "slurm/pretrain.sbatch"), "job.yaml", "seed"]
    number = slurm.run("env", "-C", str(tmp_path), "sbatch", "--parsable", *array, env=env)
    failing = dict(line.split() for line in slurm.run(*chain, "absent.txt", *prepare[1:], env=env).splitlines())
    losses = []
    for task in (1, 2):
        assert slurm.wait(f"{number}_{task}")["JobState"] == "COMPLETED", _logs(tmp_path)
        losses.append(json.loads((tmp_path / f"seed-{task}/status.json").read_text())["loss"])
    assert losses[0] != losses[1]
    assert [slurm.wait(failing[name])["JobState"] for name in failing] == ["FAILED", "CANCELLED", "CANCELLED"]


def _logs(folder: Path) -> str:
    return "\n".join(f"--- {p.name}\n{p.read_text()[-2000:]}" for p in folder.glob("*.log"))
