"""gpt-oss's channels: what is thought, said and called, however the answer is cut; and OpenAI's own reader of it."""

from __future__ import annotations

import functools
import json
import os
import random
from typing import Any

import pytest

from swift_dist.errors import JobError
from swift_dist.plugins import find
from swift_dist.serving import reasoning
from swift_dist.serving.engines.vllm import ENGINE as VLLM
from swift_dist.serving.engines.vllm import _built_for_cpu
from swift_dist.serving.families import ROOM
from swift_dist.serving.hf.answers import ChatAnswer, message_of
from swift_dist.serving.hf.requests import Token
from swift_dist.serving.options import EngineOptions, ServedModel
from tests.support.tool_call_answers import ARGUMENTS, SCHEMAS, WRITTEN

PROMPT = "<|start|>user<|message|>hi<|end|><|start|>assistant"
NEXT = "<|end|><|start|>assistant"
WEATHER = f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{WRITTEN}"
AFTER = f"<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{WRITTEN}"

# answer -> what is thought, what is said, what is called
ANSWERS: dict[str, tuple[str, str | None, str | None, list[tuple[str, Any]]]] = {
    "thought and said": (
        f"<|channel|>analysis<|message|>They say <hi>.\n\nSo do I. {NEXT}<|channel|>final<|message|> Hi {{}} <|x|>!\n",
        "They say <hi>.\n\nSo do I. ",
        " Hi {} <|x|>!\n",
        [],
    ),
    "a call": (f"<|channel|>analysis<|message|>Look.{NEXT}{WEATHER}<|call|>", "Look.", None, [("weather", ARGUMENTS)]),
    "its end is the end token": (WEATHER, None, None, [("weather", ARGUMENTS)]),
    "the other order": (
        f"<|channel|>analysis<|message|>Look.<|end|>{AFTER}<|call|>",
        "Look.",
        None,
        [("weather", ARGUMENTS)],
    ),
    "several, with a preamble": (
        f"<|channel|>analysis<|message|>a{NEXT}<|channel|>commentary<|message|>I look.<|end|>{AFTER}<|call|>"
        "<|start|>assistant<|channel|>commentary to=functions.now<|message|>{}<|call|>",
        "a",
        "I look.",
        [("weather", ARGUMENTS), ("now", {})],
    ),
    "twice thought and said": (
        f"<|channel|>analysis<|message|>a{NEXT}<|channel|>analysis<|message|>b{NEXT}<|channel|>commentary<|message|>c"
        f"{NEXT}<|channel|>final<|message|>d<|return|>",
        "a\nb",
        "c\nd",
        [],
    ),
    "an unknown function": (
        '<|channel|>commentary to=functions.nobody <|constrain|>json<|message|>{"a": [null, 1.5, "ü\\n\\"}"]}<|call|>',
        None,
        None,
        [("nobody", {"a": [None, 1.5, 'ü\n"}']})],
    ),
    "only thought": ("<|channel|>analysis<|message|>cut off <|en", "cut off <|en", "", []),
}
ODD = {
    "no channels": ("Just <b>text</b>.", None, "Just <b>text</b>.", []),
    "as a header begins": ("to", None, "to", []),
    "no arguments of JSON": (
        '<|channel|>commentary to=functions.now<|message|>{"a": <|call|>',
        None,
        '<|channel|>commentary to=functions.now<|message|>{"a": <|call|>',
        [],
    ),
    "a tool of its own": (
        "<|channel|>analysis to=python code<|message|>print(1)<|call|>",
        None,
        "<|channel|>commentary to=python<|message|>print(1)<|call|>",
        [],
    ),
    "a cut call": (
        '<|channel|>commentary to=functions.now <|constrain|>json<|message|>{"a": [1, ',
        None,
        '<|channel|>commentary to=functions.now<|message|>{"a": [1, ',
        [],
    ),
    "a cut header": (f"<|channel|>final<|message|>Hi{NEXT}<|channel|>comm", None, "Hi", []),
    "without an end": ("<|channel|>analysis<|message|>a<|start|>assistant<|channel|>final<|message|>b", "a", "b", []),
}


def read(pieces: list[str], prompt: str = PROMPT) -> dict[str, Any]:
    parser = find(ROOM, "openai", "PARSER")(SCHEMAS)
    answer = ChatAnswer(reasoning.splitter_of(reasoning.HARMONY, prompt), parser)
    return message_of([*(answer.feed(Token(0, piece)) for piece in pieces), answer.finish()])


def shown(message: dict[str, Any]) -> tuple[str | None, str | None, list[tuple[str, Any]]]:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    read_calls = [(call["name"], json.loads(call["arguments"])) for call in calls]
    return message.get("reasoning_content"), message["content"], read_calls


def cut(text: str, seed: int) -> list[str]:
    rng = random.Random(seed)
    places = sorted(rng.sample(range(1, len(text)), min(len(text) - 1, rng.randint(1, 40))))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("name", [*ANSWERS, *ODD])
def test_what_is_thought_said_and_called(name):
    answer, *wanted = (ANSWERS | ODD)[name]
    assert shown(read([answer])) == tuple(wanted)
    for pieces in (list(answer), *(cut(answer, seed) for seed in range(100))):
        assert shown(read(pieces)) == tuple(wanted)


def test_text_is_passed_on_as_it_comes():
    answer = ChatAnswer(reasoning.splitter_of(reasoning.HARMONY, PROMPT), find(ROOM, "openai", "PARSER")(SCHEMAS))
    for header, kind in (
        ("<|channel|>analysis<|message|>", "reasoning"),
        (f"{NEXT}<|channel|>final<|message|>", "content"),
    ):
        assert not answer.feed(Token(0, header))
        for word in ("one", " two", " three"):
            assert getattr(answer.feed(Token(0, word)), kind) == word


@pytest.mark.parametrize(
    ("end", "thought", "said"),
    [
        ("", None, "Hi"),  # the answer has no channels
        ("<|channel|>final<|message|>", None, "Hi"),
        ("<|channel|>analysis<|message|>", "Hi", ""),
        ("<|channel|>analysis<|message|>So <|end|>", None, "Hi"),
    ],
)
def test_a_prompt_may_end_within_a_message(end, thought, said):
    assert shown(read(["H", "i"], PROMPT + end)) == (thought, said, [])


def test_calls_stay_in_the_text_where_no_tools_are_asked_for():
    answer = ChatAnswer(reasoning.splitter_of(reasoning.HARMONY, PROMPT), None)
    message = message_of([answer.feed(Token(0, WEATHER)), answer.finish()])
    assert message["content"] == f"<|channel|>commentary to=functions.weather<|message|>{WRITTEN}"


@functools.cache
def harmony() -> Any:
    """OpenAI's encoding, where its vocabulary lies on this machine: it is not to be downloaded by a test."""
    if not os.environ.get("TIKTOKEN_ENCODINGS_BASE"):
        pytest.skip("TIKTOKEN_ENCODINGS_BASE names no folder with o200k_base.tiktoken")
    from openai_harmony import HarmonyEncodingName, load_harmony_encoding

    return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)


@pytest.mark.parametrize("name", ANSWERS)
def test_openais_own_reader_says_the_same(name):
    from openai_harmony import Role, StreamableParser

    encoding, (answer, *wanted) = harmony(), ANSWERS[name]
    parser = StreamableParser(encoding, role=Role.ASSISTANT)
    for token in encoding.encode(answer, allowed_special="all"):
        parser.process(token)
    parser.process_eos()
    messages = [(m.channel, m.recipient, m.content[0].text) for m in parser.messages]
    thought = "\n".join(text for channel, to, text in messages if channel == "analysis" and not to)
    said = "\n".join(text for channel, to, text in messages if channel != "analysis" and not to)
    calls = [(to.removeprefix("functions."), json.loads(text)) for _, to, text in messages if to]
    assert (thought, said, calls) == (wanted[0] or "", wanted[1] or "", wanted[2])


@pytest.mark.skipif(VLLM.why_not() is not None, reason="vLLM is not installed")
@pytest.mark.parametrize(("key", "given"), [("chat_template", "given.jinja"), ("agent_format", "react")])
def test_vllm_refuses_what_it_would_not_hear(key, given, tmp_path):
    """It writes gpt-oss's prompts without a template."""
    (tmp_path / "given.jinja").write_text("{{ messages }}")
    config = {"model_type": "gpt_oss", "head_dim": 64, "num_attention_heads": 2, "hidden_size": 64, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("<|channel|>analysis<|message|> <|call|>")
    use_gpu = not _built_for_cpu()
    options = EngineOptions(**{key: str(tmp_path / given) if key == "chat_template" else given})
    with pytest.raises(JobError, match="without a template"):
        VLLM.check(ServedModel("tiny", str(tmp_path), options, use_gpu=use_gpu))
    words = VLLM.command(ServedModel("tiny", str(tmp_path), EngineOptions(), use_gpu=use_gpu), "127.0.0.1", 1)
    assert words[words.index("--tool-call-parser") + 1] == "openai"
    assert words[words.index("--reasoning-parser") + 1] == "openai_gptoss"
