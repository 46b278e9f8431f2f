"""`swift-dist deploy --launcher`: what is sent, what is refused, and a deployment on a Ray cluster, start to end."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from chat_model import save_chat_model
from deployment import wait_until
from openai import OpenAI
from ports import free_port

from swift_dist.cli import main
from swift_dist.cluster.runtime import _own_cluster_variables
from swift_dist.config.load import build, parse_words
from swift_dist.serving.deploy import DeployOptions
from swift_dist.serving.deployment import launched
from swift_dist.serving.deployment.folder import DeploymentFolder

ROOT = Path(__file__).parents[2]
SCRIPT = (ROOT / "slurm/serve.sbatch").read_text()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what the command lines of these tests name."""
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("model", "other", "adapter", "root"):
        Path(name).mkdir()
    for name in ("keys", "admin", "template.jinja", "config.json"):
        Path(name).write_text("a-key-of-this-test\n")
    return tmp_path


def options(*words: str) -> DeployOptions:
    return build(DeployOptions, [parse_words(words, DeployOptions)])


def artefact(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["deploy", "--dry-run", *words]) == 0
    assert not Path("runs").exists()
    return capsys.readouterr().out


SLURM = ("--launcher", "slurm", "--model", "model", "--api_keys", "keys")


# --- what is sent


def command_of(script: str) -> list[str]:
    """The words of the script's last command, after ``ray_cluster_run``."""
    line = script.rstrip().replace("\\\n", " ").splitlines()[-1]
    return shlex.split(line)[1:]


def test_the_batch_job_is_that_of_serve_sbatch(work, capsys):
    text = artefact(capsys, *SLURM, "--nnodes", "2", "--replicas", "2", "--output", "run", "--launch.slurm.time", "1-0")
    ours, theirs = (set(re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE)) for script in (text, SCRIPT))
    assert ours & theirs == {
        "--nodes=2", "--ntasks-per-node=1", "--signal=B:TERM@120", "--no-requeue", "--open-mode=append"
    }  # fmt: skip
    assert {"--gres=gpu:1", "--cpus-per-task=1", "--time=1-0", f"--output={work}/run/slurm/%j.log"} <= ours
    command, shown = command_of(text), command_of(SCRIPT)
    assert [w.replace("${SERVE_HOST:-${RAY_ADDRESS%:*}}", "${RAY_ADDRESS%:*}") for w in shown[:6]] == command[:6]
    assert command[3:6] == ["deploy", "swift-dist", "deploy"] and "--host" in command[2]
    assert f"--api_keys={work}/keys" in command and "a-key-of-this-test" not in text
    program = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([program, "-e", "SC2016", "-"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_on_the_loopback_no_keys_are_needed_and_no_host_is_added(work, capsys):
    text = artefact(capsys, "--launcher", "slurm", "--model", "model", "--host", "127.0.0.1", "--accelerator", "cpu")
    assert command_of(text)[:2] == ["swift-dist", "deploy"] and "--host" not in command_of(text)
    assert "RAY_CLUSTER_GPUS=0" in text.splitlines() and "gres" not in text.split("\n\n")[0]


ALL_PATHS = {
    "model": "model", "tokenizer": "model", "hf_config": "config.json", "cache": "not-yet", "follow": "other",
    "api_keys": "keys", "admin_keys": "admin", "chat_template": "template.jinja", "output": "run",
    "adapters": ("a=adapter", "adapter"), "models": ("b=other",), "adapter_root": ("root",),
    "model_options": ("b.chat_template=template.jinja",),
}  # fmt: skip
OF_CHANGES = {"update", "load_adapter"}


def test_every_path_is_absolute_at_submission(work):
    said = re.compile(r"\b(files?|folders?|DIR|MODEL|checkpoint)\b")
    described = {name for name, field in DeployOptions.model_fields.items() if said.search(field.description or "")}
    no_paths = {"served_model_name", "merge_lora", "trust_remote_code"}
    assert described - no_paths <= {*ALL_PATHS, *OF_CHANGES}, "a new key names a path: launched.py must know it"
    sent = launched.with_absolute_paths(DeployOptions(**ALL_PATHS))
    for key, value in ALL_PATHS.items():
        words = (value,) if isinstance(value, str) else value
        wanted = tuple("=".join([*w.split("=")[:-1], str(work / w.split("=")[-1])]) for w in words)
        assert getattr(sent, key) == (wanted[0] if isinstance(value, str) else wanted)
    for hub_id in ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B@refs/pr/1"):
        assert launched.with_absolute_paths(DeployOptions(model=hub_id)).model == hub_id


def test_what_arrives_is_what_was_typed(work):
    typed = options(
        *SLURM, "--models", "b=other", "--adapters", "a=adapter", "--autoscale", "1:3", "--max_model_len", "512",
        '--engine_args=["--foo bar", "it\'s"]', "--nnodes", "3", "--nproc_per_node", "4", "--tensor_parallel_size", "2",
        "--launch.slurm.partition", "gpu", "--output", "run", "--seed", "7",
    )  # fmt: skip
    sent = launched.prepare(typed)
    arrived = options(*sent.words)
    neutral = {"launcher": "local", "launch": type(typed.launch)(), "nnodes": 1, "nproc_per_node": None}
    assert arrived == launched.with_absolute_paths(typed).model_copy(update=neutral)
    assert (sent.cluster.nnodes, sent.cluster.nproc_per_node, sent.cluster.cpus_per_rank) == (3, 4, 1)
    assert sent.launch.slurm.partition == "gpu"


@pytest.mark.parametrize(
    ("words", "nproc", "cpus"),
    [
        (("--replicas", "4", "--nnodes", "2"), 2, 2),
        (("--replicas", "3", "--nnodes", "2", "--tensor_parallel_size", "2"), 4, 4),
        (("--autoscale", "1:3", "--cpus_per_replica", "2.5"), 3, 8),
        (("--nproc_per_node", "8", "--tensor_parallel_size", "4", "--replicas", "2"), 8, 8),
    ],
)
def test_what_a_batch_job_asks_for(work, capsys, words, nproc, cpus):
    text = artefact(capsys, *SLURM, *words)
    assert f"#SBATCH --gres=gpu:{nproc}" in text and f"#SBATCH --cpus-per-task={cpus}\n" in text


def test_a_ray_job_is_what_runs_on_the_cluster(work, capsys):
    cluster = ("--launcher", "ray", "--address", "http://head:8265", "--launch.ray.upload", "false")
    line = artefact(capsys, "--model", "model", *cluster, "--output", "run")
    words = shlex.split(line)
    assert words[words.index("--address") + 1] == "http://head:8265"
    entry = words[words.index("--") + 1 :]
    assert entry == ["exec", "swift-dist", "deploy", f"--model={work}/model", f"--output={work}/run",
                     "--launcher", "local"]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--launcher", "slrm"), "did you mean slurm"),
        (("--launcher", "kuberay"), "kuberay takes no deployments"),
        (("--launcher", "torchrun"), "torchrun takes no deployments"),
        (("--launcher", "slurm"), "api_keys: is not given"),
        (("--launcher", "ray", "--host", "0.0.0.0"), "api_keys: is not given"),
        (("--launcher", "slurm", "--api_keys", "nowhere"), "nowhere cannot be read"),
        (("--launcher", "ray", "--launch.ray.upload", "false"), "which cluster?"),
        (("--launcher", "ray", "--address", "127.0.0.1:6379"), "no address that takes jobs"),
        (("--launcher", "ray", "--address", "http://a:1", "--launch.ray.address", "http://b:1"), "given beside"),
        (("--launcher", "ray", "--address", "http://a:1", "--nnodes", "2"), "nnodes: is of --launcher slurm"),
        (("--launcher", "ray", "--launch.slurm.time", "1"), "launch.slurm: is not read"),
        ((*SLURM, "--address", "127.0.0.1:1"), "a Ray cluster of its own"),
        ((*SLURM, "--launch.slurm.requeue", "true"), "does not go back into the queue"),
        ((*SLURM, "--launch.slurm.cpus_per_task", "1", "--replicas", "4"), "cpus_per_replica"),
        ((*SLURM, "--nproc_per_node", "3", "--tensor_parallel_size", "2", "--replicas", "2"), "too few for 2 replicas"),
        ((*SLURM, "--chat_template", "nowhere.jinja"), "there is no nowhere.jinja"),
        ((*SLURM, "--models", "b=./nowhere"), "there is no ./nowhere"),
        (("--launch.slurm.time", "1"), "is read with --launcher"),
        (("--nnodes", "2"), "is read with --launcher"),
    ],
)
def test_refused(work, capsys, words, says):
    model = [] if "--model" in words else ["--model", "model"]
    assert main(["deploy", *words, *model, "--dry-run"]) == 2
    assert says in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_change_takes_no_launcher_but_this_machine(work, capsys):
    assert main(["deploy", "--status", "--launcher", "slurm"]) == 2
    assert "a change goes where the deployment was sent" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("log", "found"),
    [
        ('a line\n{\n  "a": {\n    "b": 1\n  }\n}\nafterwards\n', {"a": {"b": 1}}),
        ('{\n  "a": 1\n}', {"a": 1}),
        ('{\n  "a": 1\n}\n{not json\n', {"a": 1}),
        ("nothing\n", None),
    ],
)
def test_the_answer_is_found_in_a_log(log, found):
    assert launched._last_json(log) == found


# --- on a cluster that runs


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a user of a Ray cluster on this machine, which takes jobs."""
    variables = {**os.environ, **_own_cluster_variables(), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    variables.pop("RAY_ADDRESS", None)
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("ray")
        # Ray gives a node up that is not there after 30 s, which a busy machine may take.
        tries = (_start_ray(stack, variables, folder / str(number)) for number in range(4))
        url = next(url for url in tries if url)
        yield {**variables, "RAY_API_SERVER_ADDRESS": url}


def _start_ray(stack: ExitStack, variables: dict[str, str], log: Path) -> str | None:
    """The dashboard's address; None: Ray has given up."""
    ports = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port", "metrics-export-port")
    taken = {name: free_port() for name in ports}
    command = [sys.executable, "-P", "-m", "swift_dist.serving.engines._guard", str(os.getpid())]
    command += ["ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=4"]
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={80 << 20}"]
    command += [f"--{name}={port}" for name, port in taken.items()]
    command.append(f"--temp-dir={stack.enter_context(tempfile.TemporaryDirectory(prefix='ray-'))}")
    with log.open("wb") as output:
        process = stack.enter_context(subprocess.Popen(command, stdout=output, stderr=output, env=variables))
    stack.callback(process.send_signal, signal.SIGQUIT)  # ends everything of it at once
    wait_until(lambda: process.poll() is not None or "Ray runtime started" in log.read_text(), 240, "Ray is up")
    return f"http://127.0.0.1:{taken['dashboard-port']}" if process.poll() is None else None


def swift_dist(variables: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "swift_dist.cli", *words]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200)


def asked(variables: dict[str, str], *words: str) -> dict[str, Any]:
    done = swift_dist(variables, "deploy", *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def taken(variables: dict[str, str], *words: str) -> dict[str, Any] | None:
    """What a submission returned; None: the cluster has just started, or is slow, and nothing was submitted."""
    done = swift_dist(variables, "deploy", *words, "--json")
    if "no Ray dashboard answers" in done.stderr or "No available agent" in done.stderr:
        return None
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.timeout(900)  # of a machine that does much else
def test_a_deployment_on_a_ray_cluster_outlives_its_terminal_and_is_found_again(cluster, tmp_path):
    run, model = tmp_path / "run", save_chat_model(tmp_path / "tiny")
    folder, port = DeploymentFolder(run), free_port()
    here = ["--output", str(run)]
    start = ["--model", str(model), "--infer_backend", "hf", "--dtype", "fp32", "--port", str(port), *here]
    start += ["--launcher", "ray", "--launch.ray.follow", "false", "--launch.ray.upload", "false"]
    sent = wait_until(lambda: taken(cluster, *start), 120, "a cluster that answers in time")
    assert sent["folder"] == str(run) and sent["submission"]["launcher"] == "ray"
    assert json.loads((run / "submission.json").read_text())["id"] == sent["submission"]["id"]
    again = swift_dist(cluster, "deploy", *start)
    assert again.returncode == 2 and "output: " in again.stderr

    wait_until(lambda: folder.exists() and folder.read()["state"] == "ready", 200, "ready")
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    question = [{"role": "user", "content": "the red moon"}]
    answer = client.chat.completions.create(model="tiny", messages=question, max_tokens=4)
    assert answer.usage and answer.usage.completion_tokens > 0

    assert launched.find(DeployOptions(status=True, output=str(run))) is None  # this is the machine where it runs
    folder.write(host="another-machine")
    status = asked(cluster, "--status", *here)
    assert (status["ready"], [model["name"] for model in status["models"]]) == (True, ["tiny"])
    (tmp_path / "empty").mkdir()
    wrong = swift_dist(cluster, "deploy", "--update", str(tmp_path / "empty"), *here)
    assert wrong.returncode == 2 and "empty holds no model" in wrong.stderr, wrong.stderr
    assert "ready after" in swift_dist(cluster, "runs", "logs", str(run)).stdout

    assert "stopped" in asked(cluster, "--stop", *here)["message"]
    assert folder.read()["state"] == "stopped" and not folder.runs()
    gone = swift_dist(cluster, "deploy", "--status", *here)
    # Ray says a moment later than the folder that the job has ended.
    assert gone.returncode == 2 and ("has ended" in gone.stderr or "no deployment runs" in gone.stderr)
