"""A deployment on two Slurm nodes by the batch script: a replica on each, and an end that answers what runs."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from chat_model import save_chat_model
from load_generator import Load, chat_body

from slurm import ENDED, JOB_PORTS, Slurm, what_is_missing

ROOT = Path(__file__).parents[3]
NO_SLURM = what_is_missing()
pytestmark = [
    *(pytest.mark.testbed, pytest.mark.slow, pytest.mark.timeout(600)),
    pytest.mark.skipif(NO_SLURM is not None, reason=str(NO_SLURM)),
]
KEY = "key-of-the-test"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def submit(slurm: Slurm, folder: Path, *words: str) -> str:
    """The job's number; its log is in `folder`."""
    site = ["--nodes=2", "--cpus-per-task=4", "--gres=none", "--exclusive", f"--output={folder}/%j.log"]
    script = str(ROOT / "slurm/serve.sbatch")
    variables = {"RAY_CLUSTER_PORTS": JOB_PORTS, "RAY_CLUSTER_GPUS": "0"}  # those of the test bed are none
    return slurm.run("env", "-C", str(folder), "sbatch", "--parsable", *site, script, *words, env=variables)


def until_ready(slurm: Slurm, number: str, output: Path, log: Path) -> dict[str, Any]:
    """deployment.json, once it answers."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and slurm.job(number)["JobState"] not in ENDED:
        file = output / "deployment.json"
        if file.exists() and (found := json.loads(file.read_text()))["state"] == "ready":
            return found
        time.sleep(0.5)
    raise AssertionError(log.read_text() if log.exists() else slurm.job(number))


def status(output: Path) -> dict[str, Any]:
    """What the control API says; the nodes are this machine."""
    control = json.loads((output / "deployment.json").read_text())["control"]
    token = (output / "admin_token").read_text()
    answer = httpx.get(f"{control}/control/status", headers={"Authorization": f"Bearer {token}"}, trust_env=False)
    return answer.raise_for_status().json()


def test_a_replica_on_each_node_and_an_end_that_answers_what_runs(slurm: Slurm, tmp_path: Path) -> None:
    model = save_chat_model(tmp_path / "tiny", max_position_embeddings=4096)
    keys, output = tmp_path / "keys", tmp_path / "run"
    keys.write_text(KEY + "\n")
    words = ["--model", str(model), "--infer_backend", "hf", "--replicas", "2", "--cpus_per_replica", "3"]
    number = submit(slurm, tmp_path, str(output), str(keys), *words, "--port", str(free_port()))
    log = tmp_path / f"{number}.log"
    url = until_ready(slurm, number, output, log)["address"].removesuffix("/v1")
    replicas = status(output)["replicas"]
    assert len(replicas) == len({replica["node"] for replica in replicas}) == 2
    assert f"{url}/v1" in log.read_text()

    question = chat_body("tiny", "the red moon is", max_tokens=8, temperature=0)
    (refused,) = Load(url, [question], requests=1).run().failures
    assert refused.status == 401 and "invalid_api_key" in refused.error
    answers = Load(url, [question], 4, requests=16, api_key=KEY, keep=True).run()
    assert not answers.failures, answers.describe()
    assert len({json.loads(a.body)["choices"][0]["message"]["content"] for a in answers.good}) == 1

    long = chat_body("tiny", "the blue stone is", stream=True, max_tokens=1000, ignore_eos=True)
    with Load(url, [long], 4, requests=4, api_key=KEY).in_background() as running:
        deadline = time.monotonic() + 60
        while sum(replica["running"] for replica in status(output)["replicas"]) < 4:
            assert time.monotonic() < deadline and not running.answers, "the streams ended before they were looked for"
        slurm.run("scancel", "--batch", "--signal=TERM", number)
    assert not running.report.failures, running.report.describe()
    ended = slurm.wait(number)
    assert (ended["JobState"], ended["ExitCode"], ended["NumNodes"]) == ("COMPLETED", "0:0", "2"), log.read_text()
    assert json.loads((output / "deployment.json").read_text())["state"] == "stopped"
    slurm.clear()
    shutil.rmtree(tmp_path / f"{number}.d", ignore_errors=True)
    assert list(Path("/tmp").glob("ray-*")) == []


def test_without_keys_nothing_begins(slurm: Slurm, tmp_path: Path) -> None:
    number = submit(slurm, tmp_path, str(tmp_path / "run"), str(tmp_path / "keys"), "--model", "x")
    ended = slurm.wait(number)
    log = (tmp_path / f"{number}.log").read_text()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0"), log
    assert "no keys in" in log and "openssl rand -hex 32" in log and not (tmp_path / "run").exists()


def deploy(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "swift_dist.cli", "deploy", *words, "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_the_launcher_s_job_is_found_again_from_another_machine(slurm: Slurm, tmp_path: Path) -> None:
    model, output, keys = save_chat_model(tmp_path / "tiny"), tmp_path / "run", tmp_path / "keys"
    keys.write_text(KEY + "\n")
    words = ["--model", str(model), "--infer_backend", "hf", "--accelerator", "cpu", "--port", str(free_port())]
    site = ["--launch.slurm.ports", JOB_PORTS, "--launch.slurm.follow", "false", "--launch.slurm.exclusive", "true"]
    here = ["--output", str(output)]
    sent = deploy("--launcher", "slurm", *words, "--api_keys", str(keys), *site, *here)
    assert sent.returncode == 0, sent.stderr
    number = json.loads(sent.stdout)["submission"]["id"]
    log = output / "slurm" / f"{number}.log"
    url = until_ready(slurm, number, output, log)["address"].removesuffix("/v1")
    question = chat_body("tiny", "the red moon is", max_tokens=8, temperature=0)
    assert not Load(url, [question], 1, requests=1, api_key=KEY).run().failures

    note = json.loads((output / "deployment.json").read_text())
    (output / "deployment.json").write_text(json.dumps({**note, "host": "another-machine"}))
    status_there = deploy("--status", *here)
    assert status_there.returncode == 0, status_there.stderr
    assert [m["name"] for m in json.loads(status_there.stdout)["models"]] == ["tiny"]
    wrong = deploy("--promote", *here)
    assert wrong.returncode == 1 and "swift-dist: " in wrong.stderr, wrong.stderr

    stopped = deploy("--stop", *here)
    assert stopped.returncode == 0, stopped.stderr
    ended = slurm.wait(number)
    assert (ended["JobState"], ended["ExitCode"], ended["Requeue"]) == ("COMPLETED", "0:0", "0"), log.read_text()
    result = json.loads((output / "slurm" / f"{number}.d" / "result.json").read_text())
    assert (result["state"], result["folder"]) == ("stopped", str(output))
    assert deploy("--status", *here).returncode == 2
    slurm.clear()
