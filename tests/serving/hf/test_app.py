"""The hf engine's HTTP layer in this process: over scripted answers, over base and embedding models, and fuzzed."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import math
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from swift_dist.errors import EXIT_FAILED, JobError
from swift_dist.serving.engines.hf import ENGINE
from swift_dist.serving.hf import server
from swift_dist.serving.hf.app import create_app
from swift_dist.serving.hf.generation import Serving
from swift_dist.serving.hf.prompts import ChatPrompts
from swift_dist.serving.hf.protocol import ChatRequest
from swift_dist.serving.hf.requests import Event, Finished, GeneratorFailed, Sampling, Token
from swift_dist.serving.hf.server import load, read_served
from swift_dist.serving.options import EngineOptions, ServedModel
from tests.support.chat_model import save_chat_model

USER = [{"role": "user", "content": "the red moon is"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model"))


def served(folder: Path, **options: Any) -> ServedModel:
    return ServedModel("tiny", str(folder), EngineOptions(dtype="fp32", **options))


def loaded(folder: Path, **options: Any) -> Serving:
    return load(served(folder, **options))


def talk(serving: Serving, conversation: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        transport = httpx.ASGITransport(create_app(serving), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            return await conversation(client)

    return asyncio.run(run())


def post(serving: Serving, path: str, body: dict[str, Any]) -> httpx.Response:
    return talk(serving, lambda client: client.post(path, json=body))


class Script:
    """A generator whose answers are known: each word is a token. What it is asked is kept."""

    running = waiting = 0
    model_max_length = 4096
    adapters = ("pirate",)

    def __init__(self, tokenizer: Any, *answers: str, fails_after: int | None = None) -> None:
        self.tokenizer, self._answers, self._fails_after = tokenizer, list(answers), fails_after
        self.asked: list[tuple[str, Sampling, str | None]] = []

    def submit(self, prompt: list[int], sampling: Sampling, adapter: str | None = None) -> AsyncIterator[Event]:
        self.asked.append((self.tokenizer.decode(prompt), sampling, adapter))
        return self._events(self._answers.pop(0), len(prompt))

    async def _events(self, answer: str, prompt: int) -> AsyncIterator[Event]:
        pieces = [answer[at : at + 3] for at in range(0, len(answer), 3)]
        for index, piece in enumerate(pieces):
            if index == self._fails_after:
                raise GeneratorFailed("out of memory")
            yield Token(5, piece, piece.encode(), -0.5)
        yield Finished("stop", None, prompt, len(pieces))


@pytest.fixture(scope="module")
def real(folder) -> Iterator[Serving]:
    serving = loaded(folder, agent_format="hermes", reasoning_parser="qwen3")
    yield serving
    serving.generator.close()


def scripted(real: Serving, *answers: str, **options: Any) -> Serving:
    changed = {name: getattr(real, name) for name in ("served", "prompts", "defaults", "metrics", "tools", "reasoning")}
    return Serving(**changed, generator=Script(real.tokenizer, *answers, **options))


def message(serving: Serving, stream: bool, **asked: Any) -> tuple[dict[str, Any], str]:
    """The message and its finish reason; a stream's chunks added up."""
    answer = post(serving, "/v1/chat/completions", {"messages": USER, "stream": stream, **asked})
    assert answer.status_code == 200, answer.text
    if not stream:
        (choice,) = answer.json()["choices"]
        return choice["message"], choice["finish_reason"]
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    whole: dict[str, Any] = {"content": "", "tool_calls": []}
    for chunk in map(json.loads, events[:-1]):
        (choice,) = chunk["choices"]
        delta = choice["delta"]
        for key in ("content", "reasoning", "reasoning_content"):
            if key in delta:
                whole[key] = whole.get(key, "") + delta[key]
        whole["tool_calls"] += delta.get("tool_calls", [])
    return whole, choice["finish_reason"]


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_text_and_calls_of_one_answer(real, stream):
    serving = scripted(real, f"<think>\nFirst\n\nthen\n</think>\n\nI look.\n{CALL}\n{CALL}")
    found, reason = message(serving, stream, tools=[TOOL])
    assert found["reasoning"] == found["reasoning_content"] == "First\n\nthen"
    assert found["content"] == "I look."
    assert [call["function"]["name"] for call in found["tool_calls"]] == ["weather", "weather"]
    assert [json.loads(call["function"]["arguments"]) for call in found["tool_calls"]] == [{"city": "Bonn"}] * 2
    assert len({call["id"] for call in found["tool_calls"]}) == 2
    assert reason == "tool_calls"
    prompt, sampling, adapter = serving.generator.asked[0]
    assert "<tools>" in prompt
    assert "weather" in prompt
    assert adapter is None
    assert sampling.guide is None


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_wanted_is_not_there(real, stream):
    answer = f"<think>a</think>b\n{CALL}\n{CALL}"
    found, _ = message(scripted(real, answer), stream, tools=[TOOL], parallel_tool_calls=False, include_reasoning=False)
    assert "reasoning" not in found
    assert len(found["tool_calls"]) == 1
    serving = scripted(real, answer)
    found, reason = message(serving, stream, tools=[TOOL], tool_choice="none")
    assert found["content"] == f"b\n{CALL}\n{CALL}"
    assert reason == "stop"
    assert "weather" not in serving.generator.asked[0][0]


def test_a_conversation_with_calls_goes_back_to_the_model(real):
    """As the official client sends a message back that it was given."""
    call = {"id": "call_1", "type": "function", "index": 0, "function": {"name": "weather", "arguments": '{"a": "ü"}'}}
    given = {
        "role": "assistant",
        "content": None,
        "tool_calls": [call],
        "refusal": None,
        "annotations": [],
        "audio": None,
    }
    result = {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sun"}]}
    serving = scripted(real, "fine")
    message(serving, False, messages=[*USER, given, result], tools=[TOOL], model="pirate")
    prompt, _, adapter = serving.generator.asked[0]
    assert '{"name": "weather", "arguments": {"a": "ü"}}' in prompt
    assert "<tool_response>\nsun\n</tool_response>" in prompt
    assert adapter == "pirate"


@pytest.mark.parametrize(("known", "role"), [("", "system"), ("{# 'developer' #}", "developer")])
def test_what_the_developer_says_reaches_templates_that_do_not_know_that_role(folder, tmp_path, known, role):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    file = tmp_path / "template"
    file.write_text(known + tokenizer.chat_template)
    request = ChatRequest(messages=[{"role": "developer", "content": "Be brief."}, *USER])
    rendered = ChatPrompts(tokenizer, EngineOptions(chat_template=str(file)), "tiny").render(request, [])
    assert rendered.text.startswith(f"<|im_start|>{role}\nBe brief.")


def test_generation_stops_where_a_result_would_stand(folder):
    real = loaded(folder, agent_format="react")
    try:
        serving = scripted(real, 'Thought: hm\nAction: weather\nAction Input: {"city": "Bonn"}\n')
        found, reason = message(serving, True, tools=[TOOL], stop="END")
        assert (found["content"], reason) == ("Thought: hm", "tool_calls")
        assert serving.generator.asked[0][1].stop == ("END", "Observation:")
        call = {**found["tool_calls"][0], "type": "function"}
        messages = [*USER, {"role": "assistant", "content": "Thought: hm", "tool_calls": [call]}]
        serving = scripted(real, "Thought: I know\nFinal Answer: sun")
        message(serving, False, messages=[*messages, {"role": "tool", "content": "sun"}], tools=[TOOL])
        # the model goes on in its own turn
        assert serving.generator.asked[0][0].endswith(
            'Thought: hm\nAction: weather\nAction Input: {"city": "Bonn"}\nObservation: sun\n'
        )
    finally:
        real.generator.close()


@pytest.mark.parametrize("stream", [False, True])
def test_the_tokens_of_every_prompt_are_counted_once(real, stream):
    serving = scripted(real, *"abcd")
    before = serving.metrics.prompt_tokens._value.get()
    body = {"prompt": [[5, 6, 7], [8]], "n": 2, "stream": stream}
    assert post(serving, "/v1/completions", body).status_code == 200
    assert serving.metrics.prompt_tokens._value.get() - before == 4


def test_an_engine_that_dies_says_so_in_the_stream_and_to_health(real):
    async def conversation(client: httpx.AsyncClient) -> None:
        assert (await client.get("/health")).status_code == 200
        answer = await client.post("/v1/chat/completions", json={"messages": USER, "stream": True})
        last = [line for line in answer.text.splitlines() if line][-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "engine_failed"
        assert "out of memory" in error["message"]
        assert (await client.get("/health")).status_code == 503

    talk(scripted(real, "hello world", fails_after=2), conversation)
    answer = post(scripted(real, "hello world", fails_after=2), "/v1/chat/completions", {"messages": USER})
    assert answer.status_code == 503


def test_an_engine_that_dies_ends_the_process_once_it_has_said_so(folder, monkeypatch):
    serving = loaded(folder)
    monkeypatch.setattr(server, "load", lambda served: serving)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ENGINE.command(served(folder), "127.0.0.1", port)
    with ThreadPoolExecutor(1) as process:
        ended = process.submit(server.main, words[words.index("--served") :])
        body = {"prompt": "the red", "max_tokens": 400, "ignore_eos": True, "stream": True}
        client = httpx.Client(transport=httpx.HTTPTransport(retries=8), timeout=20)  # it starts to listen meanwhile
        with client, client.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            monkeypatch.setattr(serving.generator._scheduler, "_admit", lambda: 1 / 0)
            *_, last = lines
        assert "division by zero" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert ended.result(20) == EXIT_FAILED


def test_an_answer_that_an_error_of_ours_breaks(real):
    """The server's own failure is an event of the stream too, and a 500 otherwise; neither tells a traceback."""
    serving = scripted(real)  # has no answer left
    answer = post(serving, "/v1/chat/completions", {"messages": USER})
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "pop" not in answer.text


def test_no_chat_template(tmp_path):
    """As base models are: chat says what to do, completions answer."""
    base = save_chat_model(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    serving = loaded(base)
    try:
        refused = post(serving, "/v1/chat/completions", {"messages": USER})
        assert refused.status_code == 400
        assert "--chat_template" in refused.json()["error"]["message"]
        assert post(serving, "/v1/completions", {"prompt": "a"}).json()["usage"]["completion_tokens"] <= 16
        tools = post(serving, "/v1/chat/completions", {"messages": USER, "tools": [TOOL]})
        assert "tool_call_parser" in tools.json()["error"]["message"]
    finally:
        serving.generator.close()
    with pytest.raises(JobError, match="no chat template"):
        ENGINE.check(served(base, agent_format="react"))


def vector(text: str) -> list[float]:
    packed = base64.b64decode(text)
    return list(struct.unpack(f"<{len(packed) // 4}f", packed))


def test_embeddings(tmp_path):
    folder = save_chat_model(tmp_path / "model")
    file = folder / "config.json"
    serving = loaded(folder, task="embed")
    try:
        texts = ["the red moon", "a bird"]
        plain = post(serving, "/v1/embeddings", {"input": texts}).json()
        told = f"swift_dist:prompt_tokens_total {plain['usage']['total_tokens']}.0"
        assert told in serving.metrics.text().decode()
        assert [round(math.hypot(*one["embedding"]), 4) for one in plain["data"]] == [1, 1]
        packed = post(serving, "/v1/embeddings", {"input": texts, "encoding_format": "base64"}).json()
        for one, other in zip(plain["data"], packed["data"], strict=True):
            assert vector(other["embedding"]) == pytest.approx(one["embedding"], abs=1e-6)
        assert plain["usage"]["total_tokens"] == sum(len(serving.tokenizer(text)["input_ids"]) for text in texts)
        short = {"input": texts[0], "dimensions": 4}
        assert post(serving, "/v1/embeddings", short).json()["error"]["param"] == "dimensions"
        file.write_text(json.dumps({**json.loads(file.read_text()), "matryoshka_dimensions": [4, 8]}))
        four = post(serving, "/v1/embeddings", short).json()["data"][0]["embedding"]
        first = plain["data"][0]["embedding"][:4]
        assert four == pytest.approx([value / math.hypot(*first) for value in first], abs=1e-6)
        assert post(serving, "/v1/embeddings", {"input": "moon " * 600}).status_code == 400
        assert post(serving, "/v1/chat/completions", {"messages": USER}).status_code == 400
    finally:
        serving.generator.close()


def test_the_models_own_defaults(tmp_path):
    """As vLLM: generation_config.json says what holds where a request says nothing."""
    folder = save_chat_model(tmp_path / "model")
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "temperature": 0.6, "top_k": 20, "max_new_tokens": 7}))
    serving = loaded(folder)
    try:
        script = Serving(**{**vars(serving), "generator": Script(serving.tokenizer, "a", "b")})
        post(script, "/v1/chat/completions", {"messages": USER})
        post(script, "/v1/chat/completions", {"messages": USER, "temperature": 0, "top_k": -1, "max_tokens": 3})
        first, second = (sampling for _, sampling, _ in script.generator.asked)
        assert (first.temperature, first.top_k, first.top_p, first.max_tokens) == (0.6, 20, 1, 7)
        assert (second.temperature, second.top_k, second.max_tokens) == (0, 0, 3)
    finally:
        serving.generator.close()


@pytest.mark.parametrize(
    ("options", "key", "said"),
    [
        ({"tool_call_parser": "hermess"}, "tool_call_parser", "hermes"),
        ({"reasoning_parser": "deepseek_r2"}, "reasoning_parser", "deepseek_r1"),
        ({"agent_format": "reakt"}, "agent_format", "react"),
        ({"agent_format": "react", "tool_call_parser": "hermes"}, "tool_call_parser", "react"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size", "one device"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size", "one device"),
        ({"chat_template": "/nowhere"}, "chat_template", "no file"),
        ({"task": "embed", "agent_format": "react"}, "agent_format", "no text"),
        ({"task": "embed", "seed": 1}, "seed", "no text"),
        ({"task": "embed", "max_num_seqs": 8}, "max_num_seqs", "without a cache"),
        ({"task": "embed", "max_loras": 0}, "max_loras", "without adapters"),
        ({"gpu_memory_utilization": 0.5}, "gpu_memory_utilization", "CPU"),
        ({"use_gpu": True, "cpu_cache_gib": 2.0}, "cpu_cache_gib", "GPU"),
        ({"engine_args": ("--max-speed", "9")}, "engine_args", "--max-speed"),
        ({"engine_args": ("--grace", "long")}, "engine_args", "long"),
    ],
)
def test_what_the_engine_refuses_before_it_starts(folder, options, key, said):
    options = dict(options)
    given = dataclasses.replace(served(folder), use_gpu=options.pop("use_gpu", False), options=EngineOptions(**options))
    with pytest.raises(JobError) as refused:
        ENGINE.check(given)
    assert refused.value.key == key
    assert said in str(refused.value)


def test_adapters_are_looked_at_before_the_start(folder, tmp_path):
    given = ServedModel("tiny", str(folder), EngineOptions(), adapters={"a": str(tmp_path)})
    with pytest.raises(JobError, match=r"no adapter_config\.json"):
        ENGINE.check(given)
    (tmp_path / "adapter_config.json").write_text("{}")
    ENGINE.check(given)
    for wrong in (
        ServedModel("tiny", str(folder), EngineOptions(max_loras=0), adapters=given.adapters),
        ServedModel("tiny", str(folder), EngineOptions(task="embed"), adapters=given.adapters),
        ServedModel("a", str(folder), EngineOptions(), adapters=given.adapters),
    ):
        with pytest.raises(JobError):
            ENGINE.check(wrong)


def test_the_command_hands_everything_over(folder):
    given = ServedModel(
        "n", str(folder), EngineOptions(seed=3, engine_args=("--grace", "1")), adapters={"a": "/b"}, use_gpu=True
    )
    command = ENGINE.command(given, "127.0.0.1", 1)
    assert read_served(command[command.index("--served") + 1]) == given
    assert command[-2:] == ["--grace", "1"]


def test_models_say_from_which_folder_an_adapter_came(real):
    serving = scripted(real)
    serving.served = dataclasses.replace(serving.served, adapters={"pirate": "/adapters/pirate"})
    cards = talk(serving, lambda client: client.get("/v1/models")).json()["data"]
    assert [card["root"] for card in cards] == [serving.served.path, "/adapters/pirate"]
