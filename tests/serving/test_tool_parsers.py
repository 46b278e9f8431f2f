"""Calls of tools read from text: the families' own notations, cut anywhere, and what is not a call."""

from __future__ import annotations

import json
import random

import pytest

from swift_dist.plugins import find, names
from swift_dist.serving.engines import _parsers
from swift_dist.serving.families import ROOM, reasoning_tags_of, tool_parser_of
from swift_dist.serving.options import EngineOptions
from swift_dist.serving.reasoning import PARSERS, ReasoningSplitter, tags_of
from swift_dist.serving.tool_parsers.base import Call, Event, typed
from tests.support.tool_call_answers import ANSWERS, SCHEMAS


def read(name: str, pieces: list[str]) -> tuple[str, list[Call]]:
    parser = find(ROOM, name.split()[0], "PARSER")(SCHEMAS)
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    events += parser.finish()
    return "".join(e for e in events if isinstance(e, str)), [e for e in events if isinstance(e, Call)]


def cut(text: str, rng: random.Random) -> list[str]:
    places = sorted(rng.sample(range(1, len(text)), min(len(text) - 1, rng.randint(1, 40)))) if len(text) > 1 else []
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def test_every_parser_has_an_answer_here():
    assert {name.split()[0] for name in ANSWERS} == set(names(ROOM))


@pytest.mark.parametrize("name", ANSWERS)
def test_calls_and_the_text_before_them(name):
    answer, before, calls = ANSWERS[name]
    text, found = read(name, [answer])
    assert text.strip() == before
    assert [(call.name, json.loads(call.arguments)) for call in found] == calls


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("qwen3_coder", "<tool_call><function= weather ><parameter=city>12345</parameter></function></tool_call>"),
        (
            "minimax_m2",
            '<minimax:tool_call><invoke name=" weather "><parameter name="city">12345</parameter></invoke>'
            "</minimax:tool_call>",
        ),
    ],
)
def test_space_around_a_name_does_not_hide_its_schema(name, answer):
    assert read(name, [answer]) == ("", [Call("weather", '{"city": "12345"}')])


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "12345", "12345"),
        ({"type": ["string", "null"]}, "12345", "12345"),
        ({"anyOf": [{"type": "integer"}, {"oneOf": [{"type": "string"}, {"type": "null"}]}]}, "12345", "12345"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", None),
        ({"type": "string"}, "null", "null"),
        ({"type": ["integer", "null"]}, "12345", 12345),
        ({"anyOf": [{"type": "integer"}, True], "type": None}, "12345", 12345),
        ({}, "[1]", [1]),
        ({"type": "integer"}, "many", "many"),
    ],
)
def test_bare_text_is_a_string_wherever_the_schema_allows_one(schema, text, value):
    assert typed(text, schema) == value


@pytest.mark.parametrize("name", ANSWERS)
def test_however_it_is_cut_it_is_the_same(name):
    answer = ANSWERS[name][0]
    whole = read(name, [answer])
    for seed in range(100):
        assert read(name, cut(answer, random.Random(seed))) == whole
    assert read(name, list(answer)) == whole


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize(
    "text",
    [
        "Hello, world.",
        "  a < b [x] {y}\n\n",
        '{"answer": 42}',
        '{"name": "nobody", "parameters": {}}',
        "[1, 2]",
        "[weather(1)]",
        "[unknown(city='x')]",
        "<tool_call>not json</tool_call> and more",
        "<tool_call>\n<function=",
        "[TOOL_CALLS][{",
        "Action: think\nand so on",
        "<｜tool▁calls▁begin｜>?<｜tool▁calls▁end｜>",
        "✿FUNCTION✿: x",
        "",
    ],
)
def test_what_is_no_call_stays_text(name, text):
    """Nothing of it is lost or held back, and no call is made of it."""
    for pieces in ([text], list(text)):
        shown, calls = read(name, pieces)
        assert calls == []
        assert shown == text


@pytest.mark.parametrize("name", ANSWERS)
def test_text_is_passed_on_as_it_comes(name):
    parser = find(ROOM, name.split()[0], "PARSER")(SCHEMAS)
    shown = ""
    for piece in "The answer is a long one".split(" "):
        shown += "".join(e for e in parser.feed(piece + " ") if isinstance(e, str))
        assert piece[:-1] in shown


def test_the_last_call_needs_no_closing_tag():
    """Some models end their turn with the token of that tag, whose text is then not there."""
    assert read("hermes", ['<tool_call>\n{"name": "now", "arguments": {}}'])[1] == [Call("now", "{}")]


def test_a_react_call_is_passed_on_when_its_arguments_are_complete():
    parser = find(ROOM, "react", "PARSER")(SCHEMAS)
    assert parser.feed('Action: weather\nAction Input: {"city": {"a"') == []
    assert parser.feed(": 1}}") == [Call("weather", '{"city": {"a": 1}}')]


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        (
            'a:{b:[{c:<|"|>x, {y}: [z]<|"|>}, [], {}], d:null},e:-1.5e3',
            {"a": {"b": [{"c": "x, {y}: [z]"}, [], {}], "d": None}, "e": -1500.0},
        ),
        (' <|"|>k: k<|"|> : true ,\n ü:<|"|>"\\n"\n<|"|> ', {"k: k": True, "ü": '"\\n"\n'}),
        ('city:12345,days:<|"|>3<|"|>,other:<|"|>3<|"|>', {"city": "12345", "days": 3, "other": "3"}),
        ('city:<|"|><|"|>,units:[1,<|"|>2<|"|>]', {"city": "", "units": [1, "2"]}),
        ('city:<|"|>cut', None),
        ("city:", None),
        ("city", None),
        ("days:1,", None),
        ("days:1}{", None),
        ("units:[1", None),
        ("units:" + "[" * 5000, None),
    ],
)
def test_gemmas_arguments(written, arguments):
    answer = f"<|tool_call>call:weather{{{written}}}<tool_call|>"
    for pieces in ([answer], [answer.removesuffix("<tool_call|>")], list(answer)):
        text, calls = read("gemma4", pieces)
        assert [json.loads(call.arguments) for call in calls] == ([] if arguments is None else [arguments])
        assert text == ("" if calls else "".join(pieces))


@pytest.mark.parametrize(
    ("model_type", "template", "tools", "thinking"),
    [
        ("gpt_oss", "<|channel|>analysis<|message|> <|call|>", "openai", "openai_gptoss"),
        ("gemma4", "<|tool_call>call: <channel|>", "gemma4", "gemma4"),
        ("gemma3_text", "<start_function_call>call:", "functiongemma", None),
    ],
)
def test_a_template_tells_parsers_of_names_that_vllm_knows(model_type, template, tools, thinking):
    options = EngineOptions()
    assert tool_parser_of(options, template) == _parsers.tool_parser(options, template) == tools
    assert _parsers.reasoning_parser(options, template, model_type) == thinking
    assert reasoning_tags_of(options, template) == PARSERS.get(thinking)
    _parsers.check_names(EngineOptions(tool_call_parser=tools, reasoning_parser=thinking))


def test_pythonic_runs_nothing():
    assert read("pythonic", ["[weather(city=__import__('os').getcwd())]"])[1] == []


THINKING = [
    ("", "<think>\nfirst\n\nthen</think>\n\nThe answer", "first\n\nthen", "The answer"),
    ("<|assistant|><think>\n", "first</think>The <think> answer", "first", "The <think> answer"),
    ("", "No thinking </think>", "", "No thinking </think>"),
    ("<think>", "cut off </thi", "cut off </thi", ""),
    ("<think>\n\n</think>\n\n", "The answer", "", "The answer"),
    ("", "  <think>a</think>", "a", ""),
    ("", "<thin", "", "<thin"),
]


@pytest.mark.parametrize(("prompt", "answer", "thought", "said"), THINKING)
def test_thinking_and_answer(prompt, answer, thought, said):
    for pieces in ([answer], list(answer), *(cut(answer, random.Random(seed)) for seed in range(20))):
        splitter = ReasoningSplitter(("<think>", "</think>"), prompt)
        found = [part for piece in pieces for part in splitter.feed(piece)] + splitter.finish()
        assert "".join(part.text for part in found if part.kind == "reasoning") == thought
        assert "".join(part.text for part in found if part.kind == "content") == said


@pytest.mark.parametrize("said", ["", "It rains."])
def test_gemma_may_call_from_within_its_thinking(said):
    call = "<|tool_call>call:now{}<tool_call|>"
    answer = f"<|channel>thought\nRain? <|to{call}{said}"
    for pieces in ([answer], list(answer)):
        splitter = ReasoningSplitter(PARSERS["gemma4"], "<|turn>model\n")
        found = [part for piece in pieces for part in splitter.feed(piece)] + splitter.finish()
        assert "".join(part.text for part in found if part.kind == "reasoning") == "Rain? <|to"
        assert "".join(part.text for part in found if part.kind == "content") == call + said


def test_the_tags_are_those_of_the_template():
    assert tags_of("{{ '[THINK]' }}{{ '[/THINK]' }}") == ("[THINK]", "[/THINK]")
    assert tags_of("{{ messages }}") is None
