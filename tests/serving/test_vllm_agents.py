"""Calls as vLLM reads them: the agent formats through our plug-in, the families' own notations as ours do."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator

import httpx
import pytest

from swift_dist.plugins import find, names
from swift_dist.serving.engines.process import EngineProcess
from swift_dist.serving.families import ROOM
from swift_dist.serving.options import EngineOptions, ServedModel
from tests.support.chat_model import save_chat_model
from tests.support.tool_call_answers import ANSWERS, SCHEMAS

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
    """What the model writes is prescribed by a regular expression."""
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


# Which of its two notations vLLM reads goes by the version of Mistral's own tokenizer, which the others do not have.
# Of gpt-oss vLLM needs OpenAI's vocabulary, which is downloaded.
NOT_READ = ("mistral", "react", "qwen_agent", "openai")
FAMILIES = [name for name in ANSWERS if name.split()[0] not in NOT_READ and name in names(ROOM)]
MARKERS = ["<|python_tag|>", "<tool_call>", "</tool_call>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"]
MARKERS += ["<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>"]
MARKERS += ["<|tool_call_argument_begin|>", "<minimax:tool_call>", "</minimax:tool_call>", "<|tool_call|>"]
MARKERS += ["<seed:tool_call>", "</seed:tool_call>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"]
MARKERS += ["<|tool_call>", "<tool_call|>", "<|channel>", "<channel|>", '<|"|>']


@pytest.mark.table
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FAMILIES)
def test_vllm_reads_the_same_calls(name, tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda of: "0.29.0+cpu" if of == "vllm" else version(of))
    from transformers import AutoTokenizer
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers.abstract_tool_parser import ToolParserManager

    tokenizer = AutoTokenizer.from_pretrained(save_chat_model(tmp_path / "model"))
    tokenizer.add_special_tokens({"additional_special_tokens": MARKERS})
    tools = [{"type": "function", "function": {"name": key, "parameters": value}} for key, value in SCHEMAS.items()]
    request = ChatCompletionRequest(messages=[{"role": "user", "content": "x"}], tools=tools, tool_choice="auto")
    answer, before, calls = ANSWERS[name]
    found = ToolParserManager.get_tool_parser(name)(tokenizer, request.tools).extract_tool_calls(answer, request)
    assert [(call.function.name, json.loads(call.function.arguments)) for call in found.tool_calls] == calls
    assert (found.content or "").strip() == before
