"""Chats of gpt-oss, Gemma 4 and FunctionGemma: templates of their shape, and answers whose signs are special tokens."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from chat_model import save_chat_model
from transformers import AutoTokenizer

from swift_dist.serving.hf.app import create_app
from swift_dist.serving.hf.generation import Serving
from swift_dist.serving.hf.guides import Guides
from swift_dist.serving.hf.requests import Event, Finished, Guide, Sampling, Thinking, Token
from swift_dist.serving.hf.server import load
from swift_dist.serving.hf.text import Detokenizer, decoder
from swift_dist.serving.options import EngineOptions, ServedModel
from swift_dist.serving.reasoning import HARMONY, PARSERS

HARMONY_TEMPLATE = """\
{%- if tools %}<|start|>developer<|message|>
{%- for tool in tools %}{{ tool.function.name }} {% endfor %}<|end|>{% endif %}
{%- for message in messages %}
{%- if message.tool_calls %}
{%- if message.content and message.thinking %}{{ raise_exception("Cannot pass both content and thinking") }}
{%- elif message.content %}<|start|>assistant<|channel|>analysis<|message|>{{ message.content }}<|end|>
{%- elif message.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ message.thinking }}<|end|>{% endif %}
{%- set call = message.tool_calls[0].function %}<|start|>assistant to=functions.{{ call.name -}}
<|channel|>commentary json<|message|>{{ call.arguments | tojson }}<|call|>
{%- elif message.role == "assistant" %}<|start|>assistant<|channel|>final<|message|>{{ message.content }}<|end|>
{%- elif message.role == "tool" %}<|start|>functions.weather to=assistant<|channel|>commentary<|message|>
{{- message.content | tojson }}<|end|>
{%- else %}<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""
GEMMA_TEMPLATE = """\
{%- for tool in tools or [] %}DECLARE{{ tool.function.name }}{% endfor %}
{%- for message in messages %}{{ OPEN }}{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}CALL:{{ call.function.name }}{
{%- for key, value in call.function.arguments | dictsort %}{{ key }}:SIGN{{ value }}SIGN{% endfor %}}END{% endfor %}
{%- endfor %}
{%- if add_generation_prompt %}<|turn>model
{% endif %}"""


def gemma(*signs: str) -> str:
    template = GEMMA_TEMPLATE
    for name, sign in zip(("DECLARE", "{{ OPEN }}", "CALL:", "SIGN", "END"), signs, strict=True):
        template = template.replace(name, sign)
    return template


# family -> special tokens, template, an answer that thinks, speaks and calls, the call in a later prompt, an answer
# that says something
FAMILIES = {
    "openai": (
        ("<|start|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"),
        HARMONY_TEMPLATE,
        "<|channel|>analysis<|message|>Rain?<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Köln"}',
        '<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{"city": "Köln"}<|call|>',
        "<|channel|>analysis<|message|>Rain?<|end|><|start|>assistant<|channel|>final<|message|>SAID",
    ),
    "gemma4": (
        ("<|turn>", "<turn|>", "<|tool>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>'),
        gemma("<|tool>", "<|turn>", "<|tool_call>call:", '<|"|>', "<tool_call|>") + "{# <channel|> #}",
        '<|channel>thought\nRain?<channel|>I look.<|tool_call>call:weather{city:<|"|>Köln<|"|>}<tool_call|>',
        '<|tool_call>call:weather{city:<|"|>Köln<|"|>}<tool_call|>',
        "<|channel>thought\nRain?<channel|>SAID",
    ),
    "functiongemma": (
        ("<start_of_turn>", "<start_function_call>", "<end_function_call>", "<escape>", "<start_function_declaration>"),
        gemma("<start_function_declaration>", "<start_of_turn>", "<start_function_call>call:", "<escape>",
              "<end_function_call>"),
        "I look.<start_function_call>call:weather{city:<escape>Köln<escape>}<end_function_call>",
        "<start_function_call>call:weather{city:<escape>Köln<escape>}<end_function_call>",
        "SAID",
    ),
}  # fmt: skip
USER = [{"role": "user", "content": "Rain?"}]
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


class Prescribed:
    """A generator whose answer is known, written as the real one does: from tokens."""

    running = waiting = 0
    model_max_length = 4096
    adapters = ()

    def __init__(self, tokenizer: Any, answer: str) -> None:
        self.tokenizer, self._answer = tokenizer, answer
        self.asked: list[tuple[str, Sampling]] = []

    async def submit(self, prompt: list[int], sampling: Sampling, adapter: str | None = None) -> AsyncIterator[Event]:
        self.asked.append((self.tokenizer.decode(prompt, skip_special_tokens=False), sampling))
        text = Detokenizer(decoder(self.tokenizer, sampling.skip_special_tokens), prompt)
        ids = self.tokenizer(self._answer, add_special_tokens=False)["input_ids"]
        for token in ids:
            yield Token(token, text.push(token))
        yield Finished("stop", None, len(prompt), len(ids))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Serving]]:
    special, template, *_ = FAMILIES[request.param]
    folder = save_chat_model(tmp_path_factory.mktemp("model"), vocab_size=400)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    serving = load(ServedModel("tiny", str(folder), EngineOptions(dtype="fp32")))
    serving.generator.close()
    yield request.param, serving


def message(serving: Serving, answer: str, stream: bool = False, **asked: Any) -> tuple[dict[str, Any], Any, Any]:
    """The message, why it ended, and what the generator was asked."""
    generator = Prescribed(serving.tokenizer, answer)
    body = {"messages": USER, "stream": stream, **asked}

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(dataclasses.replace(serving, generator=generator)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            return await client.post("/v1/chat/completions", json=body)

    answered = asyncio.run(run())
    assert answered.status_code == 200, answered.text
    if not stream:
        (choice,) = answered.json()["choices"]
        return choice["message"], choice["finish_reason"], generator.asked[0]
    found: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    events = [line.removeprefix("data: ") for line in answered.text.splitlines() if line]
    reason = None
    for choice in (json.loads(event)["choices"][0] for event in events[:-1]):
        for key in found:
            found[key] += choice["delta"].get(key) or type(found[key])()
        reason = choice["finish_reason"] or reason
    return found, reason, generator.asked[0]


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_with_what_was_thought_and_said_before_it(family: tuple[str, Serving], stream: bool) -> None:
    name, serving = family
    answer, called = FAMILIES[name][2:4]
    found, reason, (prompt, _) = message(serving, answer, stream, tools=[TOOL])
    assert "weather" in prompt
    assert found.get("reasoning_content") == ("Rain?" if name != "functiongemma" else "" if stream else None)
    assert found["content"] == "I look."
    (call,) = found["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("weather", {"city": "Köln"})
    assert reason == "tool_calls"
    given = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Rain?"}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "sun"}
    _, _, (prompt, _) = message(serving, "x", messages=[*USER, given, result], tools=[TOOL])
    assert called in prompt
    if name == "openai":
        assert "<|start|>assistant<|channel|>analysis<|message|>Rain?<|end|>" + called in prompt
        # with what was said before the call: gpt-oss's template has one place for both
        given["content"] = "I look."
        _, _, (prompt, _) = message(serving, "x", messages=[*USER, given, result], tools=[TOOL])
        assert "<|start|>assistant<|channel|>analysis<|message|>Rain?\nI look.<|end|>" + called in prompt


def test_thinking_is_told_from_the_answer_without_tools(family: tuple[str, Serving]) -> None:
    name, serving = family
    found, reason, _ = message(serving, FAMILIES[name][4].replace("SAID", "It rains."))
    assert (found["content"], reason) == ("It rains.", "stop")
    assert found.get("reasoning_content") == (None if name == "functiongemma" else "Rain?")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_call_follows_the_thinking(family: tuple[str, Serving], choice: Any) -> None:
    name, serving = family
    arguments = '{"city": "Köln"}'
    said = arguments if choice != "required" else f'[{{"name": "weather", "parameters": {arguments}}}]'
    answer = FAMILIES[name][4].replace("SAID", said)
    found, _, (_, sampling) = message(serving, answer, tools=[TOOL], tool_choice=choice)
    (call,) = found["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("weather", {"city": "Köln"})
    # and the guide lets the model write just that
    assert sampling.guide is not None
    matcher = Guides(serving.tokenizer, len(serving.tokenizer), [2]).matcher(sampling.guide)
    ids = serving.tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert matcher.validate_tokens(ids) == len(ids)
    broken = serving.tokenizer(answer.replace("{", "x{"), add_special_tokens=False)["input_ids"]
    assert matcher.validate_tokens(broken) < len(broken)


STRICT: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"enum": [1, 2]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
FREE = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
THOUGHT = '<|channel|>analysis<|message|>I could say {"city"}.<|end|><|start|>assistant'
CALL = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"


@pytest.mark.parametrize(
    ("answer", "whole"),
    [
        (THOUGHT + CALL + '{"city": "Köln", "days": 2}', True),
        (CALL + '{"city": "Köln", "days": 2}', True),
        (THOUGHT + THOUGHT + ' to=functions.weather<|channel|>commentary json<|message|>{"city":"","days":1}', True),
        (THOUGHT + "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" + CALL, True),
        ('<|channel|>commentary to=functions.now json<|message|>{"any": ["thing"]}', True),
        (THOUGHT + "<|channel|>final<|message|>Rain.", True),
        (THOUGHT + CALL + '{"city": "Köln", "days": 3', False),
        (THOUGHT + CALL + '{"town', False),
        (THOUGHT + CALL.replace("weather", "wether"), False),
        (THOUGHT + CALL + '{"city": "Köln", "days": 2}<|end|>', False),
    ],
)
def test_strict_calls_of_gpt_oss(family: tuple[str, Serving], answer: str, whole: bool) -> None:
    name, serving = family
    if name != "openai":
        with pytest.raises(AssertionError, match="strict tools are not guided"):
            message(serving, "x", tools=[STRICT])
        return
    _, _, (_, sampling) = message(serving, answer, tools=[STRICT, FREE])
    assert sampling.guide is not None
    matcher = Guides(serving.tokenizer, len(serving.tokenizer), [2]).matcher(sampling.guide)
    ids = serving.tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert (matcher.validate_tokens(ids) == len(ids)) == whole
    if answer.endswith(("}", ".")) and whole:
        matcher.consume_tokens(ids)
        assert matcher.is_accepting()


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("tags", [HARMONY, PARSERS["gemma4"]])
def test_a_guide_holds_after_the_channel_of_the_thinking(tags: Any, special: bool, tmp_path: Path) -> None:
    save_chat_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    signs = ["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|channel>", "<channel|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": signs if special else []})
    guide = Guide("choice", ("red", "blue"), Thinking(*tags, begun=False))
    matcher = Guides(tokenizer, len(tokenizer), [2]).matcher(guide)
    for text, fits in (
        (tags[0] + 'So "green"?' + tags[1] + "red", True),
        ("blue", True),
        (tags[0] + "So?" + tags[1] + "green", False),
        (tags[0] + "red", True),  # a thought so far
        ("green", False),
    ):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert (matcher.validate_tokens(ids) == len(ids)) == fits, text
