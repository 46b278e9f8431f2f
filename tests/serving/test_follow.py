"""`swift-dist deploy --follow`: each new checkpoint of a run replaces what is served, and no request fails."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from chat_model import WORDS, conversations, save_chat_model, save_rows
from deployment import Deployment, wait_until
from load_generator import Load, Running, chat_body
from openai_reference import reference, whole
from toy_engine import save_toy_model

from swift_dist.errors import RunError
from swift_dist.runs.folder import Status
from swift_dist.runs.process import ProcessIdentity
from swift_dist.serving.deploy import DeployOptions
from swift_dist.serving.deployment import follow as follow_module
from swift_dist.serving.deployment.folder import DeploymentFolder
from swift_dist.serving.deployment.follow import newest_weights

TOY = ("--infer_backend", "toy_engine:ENGINE")


class Run:
    """The folder of a run, as far as who follows it looks: its checkpoints are models of the toy engine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "job.yaml").write_text("{}\n")
        self.say("running")

    def say(self, state: str) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        status = Status(state, ProcessIdentity("host", os.getpid(), "space", 1), now, now)  # type: ignore[arg-type]
        (self.folder / "status.json").write_text(json.dumps(dataclasses.asdict(status)))

    def save(self, step: int, is_whole: bool = True) -> None:
        folder = save_toy_model(self.folder / "checkpoints" / f"step_{step}", f"step_{step}")
        if not is_whole:
            (folder / "model.safetensors").unlink()
        part = self.folder / "checkpoints" / ".latest"
        part.write_text(folder.name)
        part.replace(self.folder / "checkpoints" / "latest")


def follow(run: Path, folder: Path, *words: str) -> Deployment:
    return Deployment(folder, "--follow", str(run), "--served_model_name", "chat", *words)


def said(running: Running) -> str:
    """The text of an answer to a request that is sent from now on."""
    count = len(running.answers)
    running.wait_for(count + 2 * running._load.concurrency)
    return str(json.loads(running.answers[-1].body)["choices"][0]["message"]["content"])


def test_what_is_newest_of_a_run(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    assert newest_weights(run.folder) is None
    run.save(1)
    assert newest_weights(run.folder).folder.name == "step_1"
    save_toy_model(run.folder / "model", "final")
    assert not newest_weights(run.folder).is_final, "an export of before, and the run goes on"
    run.say("done")
    assert (newest_weights(run.folder).folder, newest_weights(run.folder).is_final) == (run.folder, True)


def a_follower(run: Run, folder: DeploymentFolder, source: str, **options: str) -> follow_module.Follower:
    """Of a deployment that began with `source`."""
    models = [SimpleNamespace(name="chat", source=source)]
    plan = SimpleNamespace(options=DeployOptions(follow=str(run.folder), **options), models=models)
    return follow_module.Follower(plan, folder)  # type: ignore[arg-type]


def test_a_run_that_goes_on_while_its_export_is_started_is_followed(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.save(1)
    save_toy_model(run.folder / "model", "final")
    run.say("done")
    follower = a_follower(run, DeploymentFolder(tmp_path / "deployment"), str(run.folder))
    assert newest_weights(run.folder) in follower._first()
    run.say("running")
    run.save(2)
    assert newest_weights(run.folder) not in follower._first()


def test_a_checkpoint_waits_while_another_version_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be refused then; it is not passed over."""
    run = Run(tmp_path / "run")
    run.save(1)
    folder = DeploymentFolder(tmp_path / "deployment")
    folder.claim()
    folder.write(state="ready", control="http://127.0.0.1:9")
    follower = a_follower(run, folder, "before", model="before")
    looks, deployed = iter([RunError("the controller is being replaced"), "candidate", "candidate"]), []

    def ask(method: str, path: str) -> dict:
        look = next(looks, "live")
        if isinstance(look, RunError):
            raise look
        return {"models": [{"name": "chat", "versions": [{"role": look}]}]}

    monkeypatch.setattr(follower._control, "ask", ask)
    monkeypatch.setattr(follow_module, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(follower, "_deploy", lambda checkpoint: deployed.append((checkpoint.name, list(looks))))
    with follower:
        wait_until(lambda: deployed, 20, "it is deployed")
    assert deployed == [("step_1", [])]


@pytest.fixture(scope="module")
def one_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, Deployment, Running]]:
    """A run that is followed from before its first checkpoint on, under load."""
    folder = tmp_path_factory.mktemp("follow")
    run = Run(folder / "run")
    before = save_toy_model(folder / "before", "before")
    with follow(run.folder, folder / "deployment", "--model", str(before), *TOY) as deployment:
        deployment.wait_ready()
        load = Load(deployment.url, [chat_body("chat", "hello")], concurrency=4, keep=True)
        with load.in_background() as running:
            yield run, deployment, running
        assert not running.report.failures, running.report.describe()


def test_each_new_checkpoint_and_then_the_export_replace_the_model(one_run: tuple[Run, Deployment, Running]) -> None:
    run, deployment, running = one_run
    assert said(running).startswith("before"), "the run has no checkpoint yet"
    run.save(1)
    wait_until(lambda: "step_1 is deployed" in deployment.stderr, 90, deployment.stderr)
    assert said(running).startswith("step_1 ")
    run.save(2, is_whole=False)
    wait_until(lambda: "step_2 is skipped: " in deployment.stderr, 60, deployment.stderr)
    assert said(running).startswith("step_1 ")
    run.save(3)
    wait_until(lambda: "step_3 is deployed" in deployment.stderr, 90, deployment.stderr)
    assert said(running).startswith("step_3 ")
    save_toy_model(run.folder / "model", "final")
    run.say("done")
    wait_until(lambda: f"{run.folder} is deployed" in deployment.stderr, 90, deployment.stderr)
    assert said(running).startswith("final ")
    run.say("running")  # it goes on, and has nothing newer yet
    time.sleep(3)
    assert "is deployed" not in deployment.stderr.partition(f"{run.folder} is deployed")[2]
    assert "Traceback" not in deployment.stderr


@pytest.mark.table
@pytest.mark.timeout(3000)
def test_a_run_that_trains_is_followed_to_its_export(tmp_path: Path) -> None:
    """`swift-dist sft` and `swift-dist deploy --follow` at the same time, with the hf engine, under a light load."""
    model = save_chat_model(tmp_path / "base", hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
    rows = save_rows(tmp_path / "rows.jsonl", [{"messages": row["messages"][:2]} for row in conversations(2000)])
    run = tmp_path / "run"
    words = ["sft", "--model", str(model), "--dataset", str(rows), "--output", str(run), "--max_length", "256"]
    words += ["--train.precision", "fp32", "--train.micro_batch_size", "8", "--train.global_batch_size", "8"]
    words += ["--optimizer.lr", "0.001", "--nproc_per_node", "1", "--json"]
    # 2,500 steps: a checkpoint takes about as long as its deployment, however fast the machine is.
    words += ["--train.epochs", "10", "--checkpoint.interval", "250", "--checkpoint.keep", "10"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "sft.err").open("wb") as errors:
        command = [sys.executable, "-m", "swift_dist.cli", *words]
        training = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        wait_until((run / "checkpoints" / "latest").is_file, 600, (tmp_path / "sft.err").read_text())
        engine = ("--infer_backend", "hf", "--dtype", "fp32")
        with follow(run, tmp_path / "deployment", *engine) as deployment:
            deployment.wait_ready(600)
            asked = [chat_body("chat", f"the red {word}", max_tokens=12, temperature=0) for word in WORDS]
            with Load(deployment.url, asked, concurrency=2, keep=True).in_background() as running:
                training.communicate(timeout=1800)
                assert training.returncode == 0, (tmp_path / "sft.err").read_text()
                wait_until(lambda: f"{run} is deployed" in deployment.stderr, 300, deployment.stderr)
                last = len(running.answers) + 4
                running.wait_for(last + 2 * len(asked))
            report = running.report
            deployed = [line for line in deployment.stderr.splitlines() if " is deployed, " in line]
            print(f"{len(report.answers)} answers, {len(report.failures)} failed", *deployed, sep="\n")
            assert not report.failures, report.describe()
            checkpoints = [line for line in deployed if "/checkpoints/step_" in line]
            assert len(checkpoints) >= 2 and len(report.count("x-swift-version")) == len(deployed) + 1
            expected = final_answers(run / "model", asked)
            for answer in report.answers[last:]:
                text = json.loads(answer.body)["choices"][0]["message"]["content"]
                assert whole(text) == expected[answer.index % len(asked)]
    finally:
        if training.poll() is None:
            training.send_signal(signal.SIGINT)
            training.communicate(timeout=60)


def final_answers(model: Path, asked: list[dict]) -> list[str]:
    """As transformers answers."""
    by = reference(model)
    return [by.text(by.greedy(by.prompt(body["messages"]), body["max_tokens"])) for body in asked]
