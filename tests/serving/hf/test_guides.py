"""Guides of the hf engine around a schema: calls that a model chooses to make, and thinking that comes first."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import torch
from chat_model import TEMPLATE, save_chat_model, save_tokenizer
from transformers import AutoTokenizer

from swift_dist.plugins import find
from swift_dist.serving.families import ROOM
from swift_dist.serving.hf.app import create_app
from swift_dist.serving.hf.generation import Serving
from swift_dist.serving.hf.guides import Guides
from swift_dist.serving.hf.requests import Calls, Guide, Thinking
from swift_dist.serving.hf.server import load
from swift_dist.serving.options import EngineOptions, ServedModel
from swift_dist.serving.tool_parsers.base import Call
from tests.support.tool_call_answers import ANSWERS, SCHEMAS

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"type": "string", "enum": ["celsius", "kelvin"]},
        "hours": {"type": "array", "items": {"enum": [6, 12]}, "maxItems": 2},
        "place": {"$ref": "#/$defs/place"},
    },
    "required": ["city", "days", "unit", "hours", "place"],
    "additionalProperties": False,
    "$defs": {"place": {"type": ["null", "boolean"]}},
}
THINK = ("<think>", "</think>")


def parser_of(name: str, schemas: Any) -> Any:
    return find(ROOM, name.split()[0], "PARSER")(schemas)


GUIDED = [name for name in ANSWERS if parser_of(name, {}).formats]


def tokens(folder: Path, special: tuple[str, ...] = (), added: tuple[str, ...] = ()) -> Any:
    save_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(added))
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


class Followed:
    """A guide, and what it allows."""

    def __init__(self, tokenizer: Any, guide: Guide) -> None:
        self._tokenizer = tokenizer
        self._guides = Guides(tokenizer, len(tokenizer), [2])
        self.matcher = self._guides.matcher(guide)

    def takes(self, text: str) -> bool:
        """Whether the text may come next; if so, it has."""
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if self.matcher.validate_tokens(ids) < len(ids):
            return False
        self.matcher.consume_tokens(ids)
        return True

    def allowed(self) -> list[int]:
        return self._guides.allowed([self.matcher])[0].nonzero().squeeze(1).tolist()

    @property
    def may_end(self) -> bool:
        return bool(self.matcher.is_accepting())


@pytest.fixture(scope="module", params=[False, True], ids=["plain markers", "special markers"])
def special(request: pytest.FixtureRequest) -> bool:
    return request.param


def tokenizer_for(name: str, special: bool, folder: Path) -> Any:
    markers = parser_of(name, {}).markers
    return tokens(folder, special=markers) if special else tokens(folder)


@pytest.mark.parametrize("name", GUIDED)
def test_the_familys_own_answer_fits_and_a_wrong_one_does_not(name: str, special: bool, tmp_path: Path) -> None:
    tokenizer = tokenizer_for(name, special, tmp_path)
    answer = ANSWERS[name][0]
    schema = {**SCHEMAS["weather"], "required": ["city", "days"], "additionalProperties": False}
    tools = (("weather", json.dumps(schema)), ("now", json.dumps(SCHEMAS["now"])))
    formats = parser_of(name, {}).formats

    def followed(**changes: Any) -> Followed:
        return Followed(tokenizer, Guide("calls", Calls(formats, changes.pop("tools", tools), **changes)))

    right = followed()
    assert right.takes(answer)
    assert right.may_end
    begin = formats[0].begin
    assert answer.count("weather") == 1
    assert not followed().takes(answer.replace("weather", "wether"))
    three = [(text, text.replace("3", '"3"', 1)) for text in ('"days": 3', ">\n3\n<", ">3<")]
    ((old, new),) = [(old, new) for old, new in three if old in answer]
    assert not followed().takes(answer.replace(old, new))
    assert followed(tools=(("weather", None), tools[1])).takes(answer.replace(old, new))  # that tool is not strict
    assert not followed(parallel=False).takes(answer)  # it calls twice
    for text in ("", "An answer {1} with <tags> and [lists].", '{"a": 1}'):
        plain = followed()
        assert plain.takes(text)
        assert plain.may_end
    half = followed()
    assert half.takes("I look. " + begin)
    assert not half.may_end


@pytest.mark.parametrize("name", GUIDED)
def test_whatever_is_drawn_after_the_beginning_is_a_call_that_fits(name: str, special: bool, tmp_path: Path) -> None:
    tokenizer = tokenizer_for(name, special, tmp_path)
    formats = parser_of(name, {}).formats
    guide = Guide("calls", Calls(formats, (("weather", json.dumps(PARAMETERS)),), parallel=False))
    ends = [form.tagged.end if form.tagged else '"' for form in formats]
    for seed in range(2):
        rng = random.Random(seed)
        followed = Followed(tokenizer, guide)
        text = "Hm. " + formats[0].begin
        assert followed.takes(text)
        drawn = tokenizer(text, add_special_tokens=False)["input_ids"]
        while not followed.may_end and len(drawn) < 400:
            end = rng.choice(ends)
            if rng.random() < 0.3 and followed.takes(end):  # strings would be long
                drawn += tokenizer(end, add_special_tokens=False)["input_ids"]
                continue
            token = rng.choice(followed.allowed())
            followed.matcher.consume_token(token)
            drawn.append(token)
        written = tokenizer.decode(drawn, skip_special_tokens=False)
        parser = parser_of(name, {"weather": PARAMETERS})
        calls = [event for event in (*parser.feed(written), *parser.finish()) if isinstance(event, Call)]
        assert [call.name for call in calls] == ["weather"], written
        jsonschema.validate(json.loads(calls[0].arguments), PARAMETERS)


@pytest.mark.parametrize("held", ["plain", "added", "special"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_guide_holds_after_the_thinking(held: str, begun: bool, tmp_path: Path) -> None:
    tokenizer = tokens(tmp_path, **({held: THINK} if held != "plain" else {}))
    guide = Guide("json_schema", json.dumps(PARAMETERS["properties"]["unit"]), Thinking(*THINK, begun))
    thought = ("" if begun else "<think>") + '\nIs it "celsius"? a < b, </thin\n</think>'
    for after in ("", "\n\n"):
        followed = Followed(tokenizer, guide)
        assert followed.takes(thought)
        assert not followed.may_end
        assert followed.takes(after + '"kelvin"')
        assert followed.may_end
    followed = Followed(tokenizer, guide)
    assert not followed.takes(thought + "kelvin")
    assert Followed(tokenizer, guide).takes('"kelvin"')
    alone = Followed(tokenizer, guide)
    assert alone.takes('"kelvin"')
    assert alone.may_end != begun  # begun, it is a thought; else an answer without one
    assert begun or not Followed(tokenizer, guide).takes("kelvin")


@pytest.mark.parametrize("kind", [("regex", "[a-c]+"), ("choice", ("a", "bc")), ("json_object", ""), ("grammar", "")])
def test_every_kind_of_guide_can_follow_thinking(kind: tuple, tmp_path: Path) -> None:
    name, given = kind
    grammars = ['start: "{}" | X\nX: /[abc]+/', 'root ::= "{}" | [abc]+']
    for value in grammars if name == "grammar" else [given]:
        followed = Followed(tokens(tmp_path), Guide(name, value, Thinking(*THINK, begun=True)))
        assert followed.takes("well </think>\n")
        assert not followed.takes("well")
        assert followed.takes("{}" if name == "json_object" else "bc")
        assert followed.may_end


@pytest.mark.parametrize("held", ["plain", "added", "special"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_call_that_is_thought_of_is_not_guided(held: str, begun: bool, tmp_path: Path) -> None:
    tokenizer = tokens(tmp_path, **({held: THINK} if held != "plain" else {}))
    formats = parser_of("hermes", {}).formats
    calls = Calls(formats, (("weather", json.dumps(PARAMETERS["properties"]["unit"])),))
    guide = Guide("calls", calls, Thinking(*THINK, begun))
    thought = ("" if begun else "<think>") + "\nI may write <tool_call> here.</think>\n\n"
    call = '<tool_call>\n{"name": "weather", "arguments": "kelvin"}\n</tool_call>'
    for answer in (thought + "Yes. " + call + call, thought + "Just text", *(() if begun else (call, "Text. " + call))):
        followed = Followed(tokenizer, guide)
        assert followed.takes(answer), answer
        assert followed.may_end
    for wrong in (thought + "<tool_call>x", *(() if begun else ("<tool_call>x", "a <think> <tool_call>x"))):
        assert not Followed(tokenizer, guide).takes(wrong), wrong


def test_what_a_notation_cannot_enforce_is_refused(tmp_path: Path) -> None:
    tokenizer = tokens(tmp_path)
    formats = parser_of("qwen3_coder", {}).formats
    for properties, said in (({"a": {"type": "string", "pattern": "x+"}}, "pattern"), ({"a": {"oneOf": []}}, "oneOf")):
        schema = json.dumps({"type": "object", "properties": properties})
        with pytest.raises(ValueError, match=said):
            Followed(tokenizer, Guide("calls", Calls(formats, (("f", schema),))))
    with pytest.raises(ValueError, match="minProperties"):
        schema = json.dumps({"type": "object", "properties": {}, "minProperties": 1})
        Followed(tokenizer, Guide("calls", Calls(formats, (("f", schema),))))


# with a model


USER = [{"role": "user", "content": "the red moon is"}]
SHORT = {
    "type": "object",
    "properties": {key: PARAMETERS["properties"][key] for key in ("days", "unit")},
    "required": ["days", "unit"],
    "additionalProperties": False,
}
ADDED = ("<tool_call>", "</tool_call>", *THINK)
STRICT = {"type": "function", "function": {"name": "weather", "parameters": SHORT, "strict": True}}


@pytest.fixture(scope="module", params=["opens", "may open"])
def serving(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Serving]:
    """A random model of a reasoning family, whose prompt opens the thinking, or leaves that to it."""
    folder = save_chat_model(tmp_path_factory.mktemp("model"), vocab_size=400, max_position_embeddings=2048)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(ADDED))
    tokenizer.chat_template = (
        TEMPLATE.replace("assistant\n' }}", "assistant\n<think>\n' }}") if request.param == "opens" else TEMPLATE
    ) + "{# <tool_call> </think> #}{{ tools }}"
    tokenizer.save_pretrained(folder)
    serving = load(ServedModel("tiny", str(folder), EngineOptions(dtype="fp32")))
    yield serving
    serving.generator.close()


def answers(serving: Serving, count: int, bias: dict[str, float], **asked: Any) -> list[dict[str, Any]]:
    ids = {str(serving.tokenizer.convert_tokens_to_ids(token)): value for token, value in bias.items()}
    body = {"messages": USER, "max_tokens": 300, "logit_bias": ids, **asked}

    async def run() -> list[dict[str, Any]]:
        transport = httpx.ASGITransport(create_app(serving))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=120) as client:
            every = (client.post("/v1/chat/completions", json={**body, "seed": seed}) for seed in range(count))
            found = await asyncio.gather(*every)
        return [one.json()["choices"][0] for one in found if one.raise_for_status()]

    return asyncio.run(run())


FORM = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SHORT, "strict": True}}
CLOSING = {"</think>": 9.0, "<think>": 6.0}


def test_a_reasoning_models_json_comes_after_its_thinking(serving: Serving) -> None:
    found = answers(serving, 4, CLOSING, response_format=FORM)
    for choice in found:
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), SHORT)
    assert any(choice["message"].get("reasoning_content") for choice in found)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_reasoning_models_forced_calls_come_after_its_thinking(serving: Serving, choice: Any) -> None:
    found = answers(serving, 4, CLOSING, tools=[STRICT], tool_choice=choice, parallel_tool_calls=False)
    for one in found:
        (call,) = one["message"]["tool_calls"]
        jsonschema.validate(json.loads(call["function"]["arguments"]), SHORT)
    assert any(one["message"].get("reasoning_content") for one in found)


def test_calls_of_strict_tools_fit_where_the_model_chooses_to_call(serving: Serving) -> None:
    asked = {"tools": [STRICT], "parallel_tool_calls": False}
    calling = {**CLOSING, "<tool_call>": 12.0}
    for one in answers(serving, 4, calling, **asked):
        assert one["finish_reason"] == "tool_calls", one
        (call,) = one["message"]["tool_calls"]
        jsonschema.validate(json.loads(call["function"]["arguments"]), SHORT)
    loose = {"type": "function", "function": {"name": "weather", "parameters": SHORT}}
    some = answers(serving, 2, calling, tools=[loose], max_tokens=100)
    assert not any(one["message"].get("tool_calls") for one in some)


def test_strict_tools_are_refused_where_they_cannot_be_guided(tmp_path: Path) -> None:
    folder = save_chat_model(tmp_path)
    serving = load(ServedModel("tiny", str(folder), EngineOptions(dtype="fp32", tool_call_parser="pythonic")))

    async def run() -> None:
        transport = httpx.ASGITransport(create_app(serving))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            body = {"messages": USER, "tools": [STRICT], "max_tokens": 5}
            refused = await client.post("/v1/chat/completions", json=body)
            assert refused.status_code == 400
            assert "strict" in refused.json()["error"]["message"]
            forced = await client.post("/v1/chat/completions", json={**body, "tool_choice": "required"})
            assert forced.status_code == 200

    try:
        with torch.inference_mode():
            asyncio.run(run())
    finally:
        serving.generator.close()
