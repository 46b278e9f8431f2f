"""What the front does with a request: whose it is, who answers, and what is refused. HAProxy and servers are real."""

from __future__ import annotations

import hashlib
import json
import random
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from fronts import CHAT, pids, wait_for
from load_generator import Load, chat_body
from ports import free_port
from prometheus_client.parser import text_string_to_metric_families
from upstreams import Upstream

from swift_dist.errors import JobError
from swift_dist.serving.front.haproxy import Front, require_port
from swift_dist.serving.front.options import FrontOptions
from swift_dist.serving.front.runtime import metrics
from swift_dist.serving.front.state import FrontState, Replica, Route, Version

ODD = ["org/name:tag", 'a "quoted" \\ name', "with space", "模型", "naïve", "😀", "'; drop", "%[rand(9)]", "$X #y", "-"]
KEYS, ADMIN = ["sk-one", "sk-two"], "sk-admin"


@dataclass
class Stage:
    """Two models, of which the first has two versions, and a control API."""

    front: Front
    upstreams: dict[str, Upstream]

    def replica(self, name: str) -> Replica:
        return Replica(name, "127.0.0.1", self.upstreams[name].port)

    def state(self, share: float = 0.25) -> FrontState:
        one = Version("chat-v1", (self.replica("a"),), 1 - share)
        two = Version("chat-v2", (self.replica("b"),), share)
        other = Version("other/v1 ü", (self.replica("b2"),))
        vectors = Version("vectors-v1", (self.replica("c"),))
        routes = (Route(("chat", *ODD), (one, two)), Route(("other",), (other,)), Route(("vectors",), (vectors,), True))
        return FrontState(routes, self.control)

    @property
    def control(self) -> tuple[str, int]:
        return ("127.0.0.1", self.upstreams["control"].port)

    def post(self, body: Any, path: str = CHAT, **more: Any) -> httpx.Response:
        content = body if isinstance(body, (bytes, str)) else json.dumps(body)
        headers = {"content-type": "application/json", "authorization": f"Bearer {KEYS[0]}", **more.pop("headers", {})}
        return httpx.post(self.front.url + path, content=content, headers=headers, timeout=60, **more)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("front")
    (folder / "keys").write_text("# callers\n" + "\n".join(KEYS) + "\n")
    (folder / "admin").write_text(ADMIN)
    options = FrontOptions(
        port=free_port(), api_keys=str(folder / "keys"), admin_keys=str(folder / "admin"), max_request_bytes=100_000
    )
    upstreams = {name: Upstream(name) for name in ("a", "b", "b2", "c", "control")}
    front = Front(folder / ("deep" * 20) / ("deeper" * 20), options)  # longer than a unix socket's path may be
    stage = Stage(front, upstreams)
    try:
        front.start(stage.state())
        yield stage
    finally:
        front.stop(drain=0)
        for upstream in upstreams.values():
            upstream.__exit__(None, None, None)
    assert not front.alive and pids(front) == ()


def error(response: httpx.Response) -> dict[str, Any]:
    """The error, in OpenAI's shape."""
    body = response.json()
    assert list(body) == ["error"] and set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"
    return body["error"]


def test_a_model_is_answered_by_its_replicas(stage: Stage) -> None:
    answer = stage.post(chat_body("other", "hello"))
    assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] == "b2"
    assert answer.headers["x-swift-version"] == "other/v1%20%C3%BC"


def test_a_model_answers_what_it_is_for(stage: Stage) -> None:
    """Embeddings of a model of embeddings, text of the others; what else is asked of them is said, and reaches none."""
    assert stage.post({"model": "vectors", "input": "hello"}, "/v1/embeddings").status_code == 200
    asked = [("vectors", path) for path in (CHAT, "/v1/completions", "/v1/responses")]
    for model, path in [*asked, ("chat", "/v1/embeddings"), (ODD[3], "/v1/embeddings")]:
        answer = stage.post({"model": model, "input": "hello", "messages": []}, path)
        said = error(answer)
        assert (answer.status_code, said["code"], said["param"]) == (400, "unsupported_task", "model"), (model, path)
        assert said["type"] == "invalid_request_error" and "x-swift-version" not in answer.headers
        assert f"served for {'embeddings' if model == 'vectors' else 'text'}" in said["message"]
    assert stage.post({"model": "vectors", "prompt": "hello"}, "/tokenize").status_code == 200


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("name", ODD)
def test_a_name_may_have_any_characters(stage: Stage, name: str, ascii_only: bool) -> None:
    """Also as ``\\u`` escapes, in which form Python's json writes what is not ASCII."""
    answer = stage.post(json.dumps({"messages": [{"model": "other"}], "model": name}, ensure_ascii=ascii_only).encode())
    assert answer.status_code == 200 and answer.headers["x-swift-version"].startswith("chat-v")
    assert answer.json()["model"] == name


def test_random_names(stage: Stage) -> None:
    """60 of random code points, each with its own version; a name that differs in its last character is unknown."""
    rng = random.Random(7)
    points = [*range(1, 0x250), *range(0x3000, 0x3100), *range(0x1F600, 0x1F640)]
    names = sorted({"".join(map(chr, rng.choices(points, k=rng.randint(1, 12)))) for _ in range(60)})
    replica = stage.replica("a")
    routes = [
        Route((name,), (Version(f"v{i} {name}", (Replica(f"{i} {name}", replica.host, replica.port),)),))
        for i, name in enumerate(names)
    ]
    stage.front.update(FrontState(tuple(routes), stage.control))
    try:
        headers = {"authorization": f"Bearer {KEYS[0]}", "content-type": "application/json"}
        with httpx.Client(headers=headers, timeout=60) as client:
            for number, name in enumerate(names):
                body = json.dumps({"model": name}, ensure_ascii=number % 2 == 0).encode()
                version = client.post(stage.front.url + CHAT, content=body).headers["x-swift-version"]
                assert unquote(version) == f"v{number} {name}"
                assert client.post(stage.front.url + CHAT, content=json.dumps({"model": name + "ł"})).status_code == 404
    finally:
        stage.front.update(stage.state())


def test_shares_are_of_requests(stage: Stage) -> None:
    """0.25 of 1,200: the standard deviation is 15."""
    report = Load(stage.front.url, [chat_body("chat", "x")], concurrency=16, requests=1200, api_key=KEYS[0]).run()
    assert not report.failures, report.describe()
    counted = report.count("x-swift-version")
    assert set(counted) == {"chat-v1", "chat-v2"} and abs(counted["chat-v2"] - 300) < 5 * 15


def test_a_share_of_nothing_gets_nothing(stage: Stage) -> None:
    stage.front.update(stage.state(share=0.0))
    load = Load(stage.front.url, [chat_body("chat", "x")], concurrency=8, requests=300, api_key=KEYS[0])
    assert load.run().count("x-swift-version") == {"chat-v1": 300}
    stage.front.update(stage.state(share=1.0))
    assert load.run().count("x-swift-version") == {"chat-v2": 300}
    stage.front.update(stage.state())


@pytest.mark.parametrize("name", ["no such", "模型2", 'quo"te\n', "x" * 5000, "", "chat\u0000"])
def test_an_unknown_model_is_not_found(stage: Stage, name: str) -> None:
    for ascii_only in (True, False):
        answer = stage.post(json.dumps({"model": name}, ensure_ascii=ascii_only).encode())
        found = error(answer)
        assert answer.status_code == 404 and found["code"] == "model_not_found" and found["param"] == "model"
        if name and len(name) < 100:
            assert f"`{name}`" in found["message"]


def test_no_model_is_named(stage: Stage) -> None:
    for body in ({}, {"model": None}, {"messages": [{"model": "chat"}]}, "{", "", "[1]", '{"model": '):
        answer = stage.post(body)
        assert answer.status_code == 400 and error(answer)["code"] == "missing_model", body


def test_a_name_is_found_behind_deep_values(stage: Stage) -> None:
    deep = "[" * 300 + "]" * 300
    assert stage.post(f'{{"x": {deep}, "model": "other"}}').headers["x-swift-version"].startswith("other")
    assert error(stage.post(f'{{"x": {deep}, "model": "none"}}'))["code"] == "model_not_found"


def test_the_only_model_needs_no_name(stage: Stage) -> None:
    stage.front.update(FrontState(stage.state().routes[1:2], stage.control))
    try:
        assert stage.post({"messages": []}).json()["choices"][0]["message"]["content"] == "b2"
        assert error(stage.post({"model": "chat"}))["code"] == "model_not_found"
        assert error(stage.post('{"model": "\\u6a21"}'))["code"] == "model_not_found"
        stage.front.update(FrontState(stage.state().routes[2:], stage.control))
        assert stage.post({"input": "hello"}, "/v1/embeddings").status_code == 200
        assert error(stage.post({"messages": []}))["code"] == "unsupported_task"
    finally:
        stage.front.update(stage.state())


def test_what_is_no_request_for_an_engine(stage: Stage) -> None:
    for headers in ({"content-type": "text/plain"}, {"content-type": ""}, {"content-type": "application/jsonx"}):
        answer = stage.post(chat_body("chat", "x"), headers=headers)
        assert answer.status_code == 415 and error(answer)["code"] == "unsupported_content_type"
    assert stage.post(chat_body("chat", "x"), headers={"content-type": "application/json; charset=utf-8"}).is_success
    got = httpx.get(stage.front.url + CHAT, headers={"authorization": f"Bearer {KEYS[0]}"})
    assert got.status_code == 405 and error(got)["code"] == "method_not_allowed"


def test_a_body_that_is_too_large(stage: Stage) -> None:
    def body(size: int) -> bytes:
        frame = len(json.dumps({"model": "other", "x": ""}))
        return json.dumps({"model": "other", "x": "y" * (size - frame)}).encode()

    assert stage.post(body(100_000)).status_code == 200
    answer = stage.post(body(100_001))
    assert answer.status_code == 413 and error(answer)["code"] == "request_too_large"

    def pieces(size: int) -> Iterator[bytes]:  # a length is not announced
        text = body(size)
        yield from (text[i : i + 7000] for i in range(0, len(text), 7000))

    headers = {"content-type": "application/json", "authorization": f"Bearer {KEYS[0]}"}
    for size, status in ((100_000, 200), (100_001, 413), (140_000, 413), (5_000_000, 413)):
        answer = httpx.post(stage.front.url + CHAT, content=pieces(size), headers=headers, timeout=60)
        assert answer.status_code == status, size
    for size in (100_001, 1_000_000, 20_000_000) * 10:  # a connection that is closed too early loses some of these
        answer = stage.post(body(size))
        assert answer.status_code == 413 and error(answer)["param"] == "body", size
    expecting = {**headers, "expect": "100-continue"}
    patient = httpx.post(stage.front.url + CHAT, content=body(200_000), headers=expecting, timeout=60)
    assert patient.status_code == 413


def raw(stage: Stage, text: bytes) -> bytes:
    """Whatever is answered to these bytes until the connection ends."""
    with socket.create_connection(("127.0.0.1", stage.front.options.port), timeout=60) as client:
        client.sendall(text)
        return b"".join(iter(lambda: client.recv(65536), b""))


def test_other_clients(stage: Stage) -> None:
    """HTTP/1.0, one that waits for ``100 Continue``, several requests at once, and no HTTP (HAProxy's own page)."""
    body = json.dumps({"model": "other", "stream": True}).encode()
    head = f"Host: x\r\nAuthorization: Bearer {KEYS[0]}\r\nContent-Type: application/json\r\n"
    request = f"POST {CHAT} HTTP/1.%d\r\n{head}Content-Length: {len(body)}\r\n%s\r\n"
    old = raw(stage, (request % (0, "")).encode() + body)
    assert old.startswith(b"HTTP/1.") and old.endswith(b"data: [DONE]\n\n") and b"chunked" not in old
    patient = raw(stage, (request % (1, "Expect: 100-continue\r\nConnection: close\r\n")).encode() + body)
    assert patient.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200") and patient.endswith(b"\r\n0\r\n\r\n")
    first, last = (request % (1, "")).encode() + body, (request % (1, "Connection: close\r\n")).encode() + body
    together = raw(stage, first + first + last)
    assert together.count(b"HTTP/1.1 200") == together.count(b"data: [DONE]") == together.count(b"\r\n0\r\n\r\n") == 3
    assert b"stream_interrupted" not in together + patient + old
    for text in (b"nonsense\r\n\r\n", b"\x16\x03\x01\x02\x00\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
        answer = raw(stage, text)
        assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400")), answer


def test_headers_that_are_too_long(stage: Stage) -> None:
    for _ in range(20):  # the body comes after the head, and the answer does not come before it
        answer = stage.post(chat_body("chat", "x" * 50_000), headers={"x-more": "y" * 40_000})
        assert answer.status_code == 431 and error(answer)["code"] == "headers_too_large"


@pytest.mark.parametrize("given", [None, "sk-three", KEYS[0] + "x", KEYS[0].upper(), "sha"])
def test_a_wrong_key(stage: Stage, given: str | None) -> None:
    if given == "sha":
        given = hashlib.sha256(KEYS[0].encode()).hexdigest().upper()
    headers = {} if given is None else {"authorization": f"Bearer {given}"}
    paths = [("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/load_lora_adapter")]
    for method, path in paths:
        answer = httpx.request(method, stage.front.url + path, headers=headers)
        assert answer.status_code == 401 and error(answer)["code"] == "invalid_api_key", path
    assert httpx.get(stage.front.url + "/health", headers=headers).status_code == 200


def test_right_keys(stage: Stage) -> None:
    for key in (*KEYS, ADMIN):
        headers = {"authorization": f"Bearer {key}"}
        assert stage.post(chat_body("chat", "x"), headers=headers).status_code == 200
        assert httpx.get(stage.front.url + "/v1/models", headers=headers).json()["server"] == "control"
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        assert stage.post({}, path, headers={"authorization": f"Bearer {KEYS[0]}"}).status_code == 401
        assert stage.post({}, path, headers={"authorization": f"Bearer {ADMIN}"}).json()["path"] == path


def test_only_named_paths_are_to_be_had(stage: Stage) -> None:
    """No verbs of the control API, and no other spelling of a path that asks for an admin key."""
    for path in ("/control/stop", "/%63ontrol/stop", "//control/stop", "/v1/load%5Flora_adapter", "/", "/v1/modelsx"):
        answer = stage.post({}, path, headers={"authorization": f"Bearer {ADMIN}"})
        assert answer.status_code == 404 and error(answer)["code"] == "not_found"


def test_keys_are_nowhere_and_not_handed_on(stage: Stage) -> None:
    stage.post(chat_body("other", "secret prompt"), headers={"x-request-id": "mine-1"})
    assert "Authorization" not in stage.upstreams["b2"].seen()["headers"]
    written = [file.read_bytes() for file in stage.front.folder.iterdir() if file.is_file()]
    assert not any(secret.encode() in text for text in written for secret in (*KEYS, ADMIN, "secret prompt"))
    for pid in pids(stage.front):
        assert b"sk-" not in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_request_has_an_id_and_a_line(stage: Stage) -> None:
    answer = stage.post(chat_body("模型", "x"), headers={"x-request-id": "mine-2"})
    assert answer.headers["x-request-id"] == "mine-2"
    made = stage.post({"model": 'no"ne'}, headers={"x-request-id": "two words"}).headers["x-request-id"]
    assert len(made) == 36
    log = stage.front.folder / "access.jsonl"
    wait_for(lambda: made.encode() in log.read_bytes())  # HAProxy writes a line after the end of an answer
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    line = next(line for line in lines if line["id"] == "mine-2")
    assert line["model"] == "模型" and line["status"] == 200 and line["path"] == CHAT
    assert (line["version"], line["replica"]) in {("chat-v1", "a"), ("chat-v2", "b")}
    assert next(line for line in lines if line["id"] == made)["model"] == 'no"ne'


def test_metrics(stage: Stage) -> None:
    answer = stage.post(chat_body("other", "x"))
    assert answer.headers["x-swift-version"] == "other/v1%20%C3%BC"
    stage.front.ensure()  # what other tests had routed is gone
    text = metrics(stage.front.folder)
    names = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    assert {"haproxy_process_uptime_seconds", "haproxy_frontend_http_responses_total"} <= names
    servers = re.findall(r'swift_dist:front_server_info\{server="(r\d+)",version="(.+)",replica="(.+)"\} 1', text)
    assert sorted(names for _, *names in servers) == [
        *(["chat-v1", "a"], ["chat-v2", "b"], ["other/v1 ü", "b2"], ["vectors-v1", "c"])
    ]
    served = dict(re.findall(r'haproxy_server_sessions_total\{.*server="(r\d+)"\} (\d+)', text))
    assert int(served[next(server for server, _, replica in servers if replica == "b2")]) > 0
    proxies = set(re.findall(r'haproxy_backend_status\{proxy="(v\d+)"', text))
    assert len(proxies) == 4, "of 64 slots those that are used"


def test_a_port_that_cannot_be_had(stage: Stage, tmp_path: Path) -> None:
    port = stage.front.options.port
    with pytest.raises(JobError, match=f"port: cannot listen on 127.0.0.1:{port}: Address already in use"):
        require_port("127.0.0.1", port)
    with pytest.raises(JobError, match="--port"):
        Front(tmp_path, FrontOptions(port=port)).start(stage.state())
    with pytest.raises(JobError, match="--host"):
        require_port("no.such.name.invalid", free_port())


@pytest.mark.parametrize("text", ["", "# only\n", "has space\n", "ключ\n"])
def test_a_file_of_no_keys(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(JobError) as raised:
        Front(tmp_path, FrontOptions(api_keys=str(tmp_path / "keys")))
    assert raised.value.key == "api_keys" and "ключ" not in str(raised.value)
    with pytest.raises(JobError, match="no_such_file"):
        Front(tmp_path, FrontOptions(admin_keys=str(tmp_path / "no_such_file")))


def test_without_keys_anybody_may_call_but_not_load_adapters(tmp_path: Path, stage: Stage) -> None:
    front = Front(tmp_path, FrontOptions(port=free_port()))
    try:
        front.start(stage.state())
        assert httpx.post(front.url + CHAT, json=chat_body("chat", "x")).status_code == 200
        assert httpx.get(front.url + "/v1/models").status_code == 200
        answer = httpx.post(front.url + "/v1/load_lora_adapter", json={})
        assert answer.status_code == 403 and error(answer)["code"] == "no_admin_keys"
    finally:
        front.stop(drain=0)
