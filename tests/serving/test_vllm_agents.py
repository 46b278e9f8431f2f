"""The agent formats' calls read by vLLM: what a model would write is prescribed by a regular expression."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from swift_dist.plugins import find
from swift_dist.serving.engines.process import EngineProcess
from swift_dist.serving.options import EngineOptions, ServedModel
from tests.support.chat_model import save_chat_model

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
ANSWER = r'Thought: hm\nAction: weather\nAction Input: \{"city": "Bonn"\}\nObservation: \{\}'


@pytest.fixture(scope="module", params=["vllm", "hf"])
def server(request, tmp_path_factory) -> Iterator[EngineProcess]:
    folder = save_chat_model(tmp_path_factory.mktemp("model"), max_position_embeddings=2048, head_dim=32)
    engine = find("swift_dist.serving.engines", request.param, "ENGINE")
    served = ServedModel("tiny", str(folder), EngineOptions(dtype="fp32", agent_format="react", max_num_seqs=4))
    if engine.why_not():
        pytest.skip(engine.why_not())
    engine.check(served)
    with EngineProcess(engine, served, log=tmp_path_factory.mktemp("log") / "log") as process:
        process.start()
        process.wait_ready()
        yield process


@pytest.mark.table
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stream", [False, True])
def test_react(server, stream):
    body = {"messages": [{"role": "user", "content": "the moon?"}], "tools": [TOOL], "max_tokens": 300}
    body |= {"stream": stream, "structured_outputs": {"regex": ANSWER.replace(r"\n", "\n")}}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    if stream:
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
        content = "".join(choice["delta"].get("content") or "" for choice in choices)
        calls = [call for choice in choices for call in choice["delta"].get("tool_calls") or ()]
        reason = choices[-1]["finish_reason"]
    else:
        (choice,) = answer.json()["choices"]
        content, calls, reason = choice["message"]["content"], choice["message"]["tool_calls"], choice["finish_reason"]
    assert content == "Thought: hm"
    assert [call["function"]["name"] for call in calls] == ["weather"]
    assert json.loads(calls[0]["function"]["arguments"]) == {"city": "Bonn"}
    assert reason == "tool_calls"
