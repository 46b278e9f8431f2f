"""What `swift-dist deploy` refuses before anything is started: exit code 2, one message, no folder."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from ports import free_port
from toy_engine import save_toy_adapter, save_toy_model

from swift_dist.cli import main
from swift_dist.cluster import devices
from swift_dist.errors import JobError, RunError
from swift_dist.serving.deploy import DeployOptions
from swift_dist.serving.deployment import changes
from swift_dist.serving.deployment.plan import describe, make_plan
from swift_dist.serving.engines.choose import find_engine
from swift_dist.serving.front.options import FrontOptions, url_of
from swift_dist.serving.inference.replicas import engine_for
from swift_dist.serving.options import EngineOptions
from swift_dist.serving.sources.source import Source, resolve_options


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return save_toy_model(tmp_path / "model", "hello")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    toy = [] if "--infer_backend" in words else ["--infer_backend", "toy_engine:ENGINE"]
    port = [] if "--port" in words else ["--port", str(free_port())]
    assert main(["deploy", *words, *toy, *port]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert not Path("runs").exists()
    return error


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "model: is not given"),
        (("--model", "nothing/here"), "nothing/here"),
        (("--model", "model", "--adapters", "a=nowhere"), "nowhere"),
        (("--model", "model", "--adapters", "model=adapter"), "is what the model itself is called"),
        (("--model", "model", "--infer_backend", "vlm"), "did you mean vllm"),
        (("--model", "model", "--replicas", "0"), "replicas"),
        (("--model", "model", "--replicas", "100000"), "this machine has"),
        (("--model", "model", "--autoscale", "3:1"), "min:max"),
        (("--model", "model", "--autoscale", "1:3", "--replicas", "2"), "set by load"),
        (("--model", "model", "--autoscale", "1:3", "--max_concurrent", "32"), "no replica has more"),
        (("--model", "model", "--downscale_delay", "3"), "no meaning without autoscaling"),
        (("--model", "model", "--models", "other"), "has no name"),
        (("--model", "model", "--models", "model=model"), "two are called model"),
        (("--model", "model", "--models", "a:b=model", "a/b=model"), "cannot tell apart"),
        (("--models", "a=model", "--served_model_name", "b"), "belongs to --model"),
        (("--model", "model", "--model_options", "task=embed"), "is not NAME.KEY=VALUE"),
        (("--model", "model", "--model_options", "other.task=embed"), "no model is called 'other'"),
        (("--model", "model", "--model_options", "model.tasks=embed"), "tasks is no key of an engine"),
        (("--model", "model", "--model_options", "model.replicas=3"), "replicas is no key of an engine"),
        (("--model", "model", "--model_options", "model.task=vectors"), "task: "),
        (("--model", "model", "--model_options", "model.accelerator=cpu"), "accelerator is the same for all models"),
        (("--model", "model", "--model_options", "model.seed=1", "model.seed=2"), "model.seed stands twice"),
        (("--model", "model", "--adapter_root", "nowhere"), "there is no folder nowhere"),
        (("--model", "model", "--api_keys", "nowhere"), "api_keys"),
        (("--model", "model", "--canary", "0.1"), "--update"),
        (("--model", "model", "--surge", "1"), "surge: is of an --update"),
        (("--model", "model", "--wait_timeout", "1"), "wait_timeout: is of a change"),
        (("--model", "model", "--accelerator", "gpu"), "accelerator: this machine has no GPU"),
        (("--follow", "nowhere"), "there is no folder nowhere"),
        (("--model", "model", "--follow", "nowhere"), "there is no folder nowhere"),
        (("--follow", "model"), "has no checkpoint yet"),
        (("--follow", "model", "--surge", "0"), "surge: 0 ends a replica before its successor starts"),
        (("--follow", "model", "--surge", "0", "--autoscale", "1:3"), "surge: 0 ends a replica before its successor"),
        (("--model", "model", "--address", "127.0.0.1:1"), "no Ray cluster answers"),
    ],
)
def test_refused(model, capsys, words, says):
    save_toy_adapter(Path("adapter"))
    assert says in refused(capsys, *words)


def test_a_port_that_is_taken(model, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "port: cannot listen" in refused(capsys, "--model", "model", "--port", str(taken.getsockname()[1]))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--status"], "no deployment runs below"),
        (["--stop", "--output", "nowhere"], "no deployment runs in nowhere"),
        (["--update", "model", "--replicas", "3"], "replicas: has no meaning with --update"),
        (["--promote", "--rollback"], "rollback: is another change"),
        (["--load_adapter", "poems"], "is not name=DIR"),
        (["--load_adapter", "../poems=adapter"], "is not name=DIR"),
        (["--status", "--canary", "0.1"], "canary: has no meaning"),
        (["--status", "--surge", "0"], "surge: has no meaning"),
        (["--update", "model", "--surge", "1", "--canary", "0.1"], "surge: a canary runs beside"),
        (["--load_adapter", "a=b", "--wait_timeout", "1"], "wait_timeout: has no meaning"),
    ],
)
def test_changes_of_nothing(model, capsys, words, says):
    assert main(["deploy", *words]) == 2
    assert says in capsys.readouterr().err


def test_a_plan_says_what_would_be_started_and_starts_nothing(model, capsys):
    save_toy_adapter(Path("adapter"))
    words = ["--model", "model", "--adapters", "poems=adapter", "--served_model_name", "chat", "--autoscale", "1:3"]
    toy = ["--infer_backend", "toy_engine:ENGINE", "--port", str(free_port())]
    assert main(["deploy", *words, *toy, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert f"address: http://127.0.0.1:{toy[-1]}/v1" in plan["plan"]
    assert plan["replicas"] == {"least": 1, "most": 3}
    assert list(plan["models"]["chat"]["adapters"]) == ["poems"]
    assert "toy_engine.py chat" in plan["models"]["chat"]["command"]
    assert toy[-1] in plan["haproxy_cfg"]
    assert not Path("runs").exists()


def test_each_model_has_the_keys_that_are_its_own(model):
    """What only models of text read is theirs; what is said for one model is for no other."""
    embedder = save_toy_model(Path("embedder"), "vectors")
    (embedder / "modules.json").write_text('[{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]')
    given = {"model": "model", "models": ["v.1=embedder", "w=model"], "infer_backend": "hf", "port": free_port()}
    shared = {"seed": 3, "cpu_cache_gib": 0.5, "dtype": "fp32"}
    own = ["v.1.max_model_len=64", "w.task=embed", "w.dtype=bf16", "w.engine_args=--log_level=info"]
    plan = make_plan(DeployOptions(**given, **shared, model_options=own))
    text, vectors, last = plan.spec().options.values()
    assert [plan.spec().task(name) for name in ("model", "v.1", "w")] == ["generate", "embed", "embed"]
    assert (text.seed, text.cpu_cache_gib, text.max_model_len, text.dtype) == (3, 0.5, None, "fp32")
    assert (vectors.seed, vectors.cpu_cache_gib, vectors.max_model_len, vectors.dtype) == (None, 1.0, 64, "fp32")
    assert (last.max_model_len, last.dtype, last.engine_args) == (None, "bf16", ("--log_level=info",))
    assert describe(plan)["models"]["v.1"]["task"] == "embed"
    with pytest.raises(JobError, match=r"v\.1\.seed: a model that is served for embeddings") as refused:
        make_plan(DeployOptions(**given, **shared, model_options=["v.1.seed=1"]))
    assert refused.value.remedy == "leave out v.1.seed"
    with pytest.raises(JobError, match="seed: "):
        make_plan(DeployOptions(**given, **shared, task="embed"))
    generates = make_plan(DeployOptions(**given, model_options=["v.1.task=generate"]))
    assert generates.spec().task("v.1") == "generate", "what is said beats what is guessed"


def test_files_that_workers_read_have_absolute_paths(model):
    Path("keys").write_text("secret\n")
    Path("own.jinja").write_text("{{ messages }}")
    given = {"model": "model", "admin_keys": "keys", "chat_template": "own.jinja", "port": free_port()}
    plan = make_plan(DeployOptions(**given, infer_backend="toy_engine:ENGINE"))
    assert plan.spec().admin_keys == str(Path("keys").absolute())
    assert plan.spec().options["model"].chat_template == str(Path("own.jinja").absolute())
    del given["chat_template"]
    own = ("model.chat_template=own.jinja",)
    plan = make_plan(DeployOptions(**given, model_options=own, infer_backend="toy_engine:ENGINE"))
    assert plan.spec().options["model"].chat_template == str(Path("own.jinja").absolute())


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://127.0.0.1:80"), ("::", "http://[::1]:80"), ("fe80::1", "http://[fe80::1]:80")],
)
def test_the_address_that_is_printed_can_be_called(host, url):
    assert url_of(FrontOptions(host=host, port=80)) == url


@pytest.mark.parametrize(("accelerator", "num_gpus"), [("auto", 1), ("gpu", 1), ("cpu", 0)])
def test_a_machine_with_gpus_can_be_asked_for_its_cpus(model, monkeypatch, accelerator, num_gpus):
    monkeypatch.setattr(devices, "gpus_of_this_machine", lambda: 2)
    given = {"model": "model", "accelerator": accelerator, "replicas": 2, "port": free_port()}
    plan = make_plan(DeployOptions(**given, infer_backend="toy_engine:ENGINE"))
    assert (plan.use_gpu, plan.num_gpus, plan.spec().num_gpus) == (num_gpus > 0, num_gpus, num_gpus)
    assert plan.served(plan.models[0]).use_gpu == (num_gpus > 0)
    engines = engine_for(plan.options, resolve_options(plan.options, trust_remote_code=False))
    assert engines.served.use_gpu == (num_gpus > 0), "of `swift-dist infer`"


def test_every_model_is_converted_into_the_cache_that_is_named(model, monkeypatch):
    asked = []

    def resolve(named, *, cache, **_):
        asked.append((named, cache))
        return Source("other", "other", named)

    monkeypatch.setattr("swift_dist.serving.deployment.plan.resolve_model", resolve)
    given = {"models": ("b=model",), "cache": "kept", "port": free_port()}
    make_plan(DeployOptions(**given, infer_backend="toy_engine:ENGINE"))
    assert asked == [("model", Path("kept"))]


def test_memory_is_asked_for_a_cache_where_there_is_one(model):
    given = {"model": "model", "replicas": 3, "cpu_cache_gib": 10**6, "port": free_port()}
    with pytest.raises(JobError, match=r"need 3000000\.0 GiB"):
        make_plan(DeployOptions(**given, infer_backend="toy_engine:ENGINE"))
    options = EngineOptions(task="embed", cpu_cache_gib=10**6)
    assert find_engine("hf").cache_gib(options) == 0
    assert find_engine("vllm").cache_gib(options) == 10**6


def test_who_waits_for_a_change_waits_for_a_controller_that_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    version = {"id": "v2", "role": "live", "share": 1.0, "goal": 1.0, "message": "", "num_replicas": 1}
    settled = {"in_force": True, "replicas": [], "models": [{"name": "chat", "versions": [version]}]}
    answers = iter([changes.NoAnswerError("gone", ""), changes.NoAnswerError("gone", ""), settled])

    class Fake:
        def ask(self, method: str, path: str) -> dict:
            answer = next(answers, changes.NoAnswerError("gone for good", ""))
            if isinstance(answer, Exception):
                raise answer
            return answer

    monkeypatch.setattr(changes, "_POLL_SECONDS", 0.01)
    model = {"name": "chat", "versions": [version]}
    assert changes.settle_change(Fake(), model, "v2")["message"] == "v2 answers all requests"
    monkeypatch.setattr(changes, "_AWAY_SECONDS", 0.5)
    with pytest.raises(RunError, match="gone for good"):
        changes.settle_change(Fake(), model, "v2")
