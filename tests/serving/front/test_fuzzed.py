"""What a deployment answers to wrong requests: chosen by schemathesis from its OpenAPI descriptions, and by hand.

Everything is real: HAProxy, the control API and an engine. A deployment with keys answers no request with a 5xx.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from chat_model import save_chat_model
from deployment import Deployment, wait_until
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.openapi import from_dict
from toy_engine import save_toy_adapter

from swift_dist.serving.engines.choose import find_engine

USER, ADMIN = "sk-user", "sk-admin"
MAX_BYTES = 20_000
FEW = 8
LONGEST = 90  # seconds of an answer by vLLM
OWN = {
    "hf": [],
    "vllm": ["--cpu_cache_gib", "0.25", "--engine_args=--enforce-eager"]  # it compiles first without
    + [f"--timeout_{what}={LONGEST}" for what in ("answer", "stream")],
}


@dataclass
class Served:
    """A deployment with keys, and a folder below which adapters may lie."""

    engine: str
    deployment: Deployment
    adapters: Path

    def ask(self, path: str, body: Any, key: str | None = USER, method: str = "POST") -> httpx.Response:
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        content = body if isinstance(body, str) else json.dumps(body)
        return httpx.request(method, self.deployment.url + path, content=content, headers=headers, timeout=2 * LONGEST)

    def description(self, of: str) -> dict[str, Any]:
        """The OpenAPI description of the engine, or of the control API."""
        known = self.deployment.folder.read()
        base = known["control"] if of == "control" else f"http://127.0.0.1:{self.deployment.replicas()[0]['port']}"
        return httpx.get(f"{base}/openapi.json", timeout=30, trust_env=False).json()


VLLM = pytest.param("vllm", marks=[pytest.mark.table, pytest.mark.timeout(900)])


@pytest.fixture(scope="module", params=["hf", VLLM])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    engine = request.param
    if why_not := find_engine(engine).why_not():
        pytest.skip(why_not)
    folder = tmp_path_factory.mktemp("served")
    model = save_chat_model(folder / "tiny", hidden_size=128, max_position_embeddings=96)
    save_toy_adapter(folder / "adapters" / "a")
    (folder / "adapters" / "link").symlink_to(save_toy_adapter(folder / "outside"))
    for name, key in (("users", USER), ("admins", ADMIN)):
        (folder / name).write_text(key + "\n")
    words = ["--model", str(model), "--infer_backend", engine, "--dtype", "fp32", *OWN[engine], "--api_keys"]
    words += [str(folder / "users"), "--admin_keys", str(folder / "admins"), "--max_request_bytes", str(MAX_BYTES)]
    words += ["--adapter_root", str(folder / "adapters")]
    with Deployment(folder / "deployment", *words) as deployment:
        yield Served(engine, deployment.wait_ready(600), folder / "adapters")


RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
THROUGH_FRONT = [
    *(("engine", "POST", f"/v1/{name}") for name in ("chat/completions", "completions", "embeddings")),
    *(("engine", "POST", path) for path in ("/tokenize", "/detokenize")),
    *(("control", "POST", f"/v1/{name}_lora_adapter") for name in ("load", "unload")),
    *(("control", "GET", path) for path in ("/v1/models", "/v1/models/{name}", "/metrics")),
]
DIRECT = [("GET", "/control/status"), *(("POST", f"/control/{verb}") for verb in ("update", "promote", "rollback"))]


def both_modes(operations: list[Any]) -> list[Any]:
    """Requests that are right; and wrong ones, where something can be: every text is the name of a model."""
    return [(one, mode) for one in operations for mode in (RIGHT, WRONG) if mode is RIGHT or "GET" not in one]


def fuzz(schema: dict[str, Any], method: str, path: str, mode: GenerationMode, url: str, key: str) -> None:
    """No answer is a 5xx, and every error has OpenAI's shape."""

    @settings(
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
        max_examples=FEW,
        derandomize=True,
    )
    @given(case=from_dict(schema)[path][method].as_strategy(generation_mode=mode))
    def asked(case: Any) -> None:
        if mode is RIGHT and isinstance(case.body, dict) and "messages" in case.body:
            case.body["model"] = "tiny"  # others are not found, whatever else they say
        answer = case.call(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=2 * LONGEST)
        assert answer.status_code < 500, (case.body, answer.status_code, answer.text[:500])
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert error["message"] and {"message", "type", "param", "code"} <= set(error)

    asked()


@pytest.mark.parametrize(("operation", "mode"), both_modes(THROUGH_FRONT))
def test_no_request_through_the_front_gets_a_5xx(served, operation, mode):
    of, method, path = operation
    schema = served.description(of)
    if path == "/v1/embeddings" and served.engine == "vllm":
        assert path not in schema["paths"], "it has no such path for a model that generates"
        return
    fuzz(schema, method, path, mode, served.deployment.url, ADMIN)


@pytest.mark.parametrize(("operation", "mode"), both_modes(DIRECT))
def test_no_request_to_the_control_api_gets_a_5xx(served, operation, mode):
    """All that it describes but the one that ends the deployment."""
    schema = served.description("control")
    described = {one for one in schema["paths"] if one.startswith("/control/")}
    assert described == {path for _, path in DIRECT} | {"/control/stop"}
    folder = served.deployment.folder
    fuzz(schema, *operation, mode, folder.read()["control"], folder.token())
    assert served.ask("/v1/models", "", method="GET").status_code == 200, "the version before goes on"


def refusal(answer: httpx.Response) -> tuple[int, str | None]:
    assert answer.headers["content-type"].startswith("application/json"), answer.text
    return answer.status_code, answer.json()["error"]["code"]


CHAT = "/v1/chat/completions"
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


@pytest.mark.parametrize("key", [None, "sk-wrong", "", "sk-user2", "sk-use"])
def test_wrong_keys(served, key):
    for path in (CHAT, "/v1/load_lora_adapter"):
        answer = served.ask(path, HELLO, key)
        assert refusal(answer) == (401, "invalid_api_key")
        assert answer.json()["error"]["message"].startswith("Incorrect API key provided.")
    assert refusal(served.ask("/metrics", "", key, "GET")) == (401, "invalid_api_key")
    assert served.ask("/v1/load_lora_adapter", {}, USER).status_code == 401, "no admin's"
    assert served.ask(CHAT, HELLO, USER).status_code == 200


def test_a_body_that_is_too_large(served):
    answer = served.ask(CHAT, {**HELLO, "user": "x" * MAX_BYTES})
    assert refusal(answer) == (413, "request_too_large")
    assert answer.json()["error"]["message"] == f"A request may have {MAX_BYTES} bytes."


@pytest.mark.parametrize("more", [{}, {"stream": True}], ids=["whole", "stream"])
def test_a_prompt_that_is_longer_than_the_context(served, more):
    answer = served.ask(CHAT, {**HELLO, "messages": [{"role": "user", "content": "red moon " * 200}], **more})
    assert refusal(answer) == (400, "context_length_exceeded" if served.engine == "hf" else 400)  # vLLM's own code
    assert "maximum context length" in answer.json()["error"]["message"]


@pytest.mark.parametrize("url", ["data:image/png;base64,AAAA", "data:text/plain,x", "file:///etc/passwd", "no url", ""])
def test_images_that_a_text_model_cannot_see(served, url):
    content = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": url}}]
    answer = served.ask(CHAT, {**HELLO, "messages": [{"role": "user", "content": content}]})
    assert answer.status_code == 400, answer.text
    assert "image" in answer.json()["error"]["message"].lower() or "multimodal" in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["nobody", "../tiny", "tiny/", "TINY", "\0", "x" * 5000])
def test_a_model_that_is_not_there(served, name):
    answer = served.ask(CHAT, {**HELLO, "model": name})
    assert refusal(answer) == (404, "model_not_found")
    assert "model" in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", "a\0b", "", " ", "x" * 129, "x" * 10_000, "ü"])
def test_names_that_no_adapter_may_have(served, name):
    answer = served.ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(served.adapters / "a")}, ADMIN)
    assert answer.status_code == 400
    assert "no name of an adapter: letters, digits and . _ : @ + -" in answer.json()["error"]["message"]
    assert served.ask("/v1/unload_lora_adapter", {"lora_name": name}, ADMIN).status_code == 404


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("../outside", 403, "not below one that the deployment was started with"),
        ("a/../../outside", 403, "not below one that the deployment was started with"),
        ("link", 403, "not below one that the deployment was started with"),
        ("/etc", 403, "not below one that the deployment was started with"),
        ("nothing", 400, "holds no adapter_config.json"),
        ("a\0b", 400, "cannot be looked at"),
        ("x" * 5000, 400, "cannot be looked at"),
    ],
)
def test_folders_that_no_adapter_may_come_from(served, path, status, says):
    body = {"lora_name": "poems", "lora_path": f"{served.adapters}/{path}" if path[0] != "/" else path}
    answer = served.ask("/v1/load_lora_adapter", body, ADMIN)
    assert (answer.status_code, says in answer.json()["error"]["message"]) == (status, True), answer.text
    assert refusal(served.ask(CHAT, {**HELLO, "model": "poems"})) == (404, "model_not_found")


@pytest.mark.parametrize("body", ["", "{", "[]", "null", '"x"', '{"model": 3}', '{"model": null}', "\x00\xff"])
def test_bodies_that_are_no_request(served, body):
    answer = served.ask(CHAT, body)
    assert answer.status_code in (400, 404) and answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize("served", [VLLM], indirect=True)
@pytest.mark.parametrize("more", [{}, {"stream": True}], ids=["whole", "stream"])
def test_an_engine_that_says_nothing_in_time(served, more):
    """vLLM's EngineCore is stopped while its server takes requests; it ends what nobody waits for when it goes on."""
    pids = served.deployment.engine_pids(served.deployment.replicas()[0])
    (core,) = [pid for pid in pids if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(core, signal.SIGSTOP)
    try:
        answer = served.ask(CHAT, {**HELLO, **more})
    finally:
        os.kill(core, signal.SIGCONT)
    assert LONGEST - 1 < answer.elapsed.total_seconds() < LONGEST + 60
    if more:  # whose head vLLM has sent already
        assert '"code": "stream_interrupted"' in answer.text and "[DONE]" not in answer.text
    else:
        assert refusal(answer) == (504, "timeout")
    wait_until(lambda: served.deployment.replicas()[0]["running"] == 0, 60, "nothing is generated for it")
    assert served.ask(CHAT, {**HELLO, **more}).status_code == 200
