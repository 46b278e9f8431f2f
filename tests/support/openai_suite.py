"""What an OpenAI server of ours must answer, whichever engine is behind it: checks with the official client, against
numbers that transformers and PEFT compute here. `CHECKS` are for a model of text, `EMBEDDING_CHECKS` for embeddings."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from openai_reference import MAX_LEN, reference, whole

MESSAGES = [{"role": "user", "content": "the red moon is bright."}]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "paint", "description": "paint stones", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "wait", "parameters": {"type": "object", "properties": {}}}},
]


@dataclass
class Target:
    """A server under test.

    Attributes:
        url: without /v1.
        model: what requests name.
        folder: the model's, in fp32, as `save_model` made it.
        adapters: served from the start.
        running: how many sequences it is generating.
        load_adapter, unload_adapter: at run time.
        spare: an adapter's folder for that.
    """

    url: str
    model: str
    folder: Path
    running: Callable[[], int]
    adapters: dict[str, Path] = field(default_factory=dict)
    load_adapter: Callable[[str, Path], None] | None = None
    unload_adapter: Callable[[str], None] | None = None
    spare: Path | None = None

    @functools.cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=120)

    def chat(self, **request: Any) -> Any:
        filled = {"model": self.model, "messages": MESSAGES, "max_tokens": 20, "temperature": 0, **request}
        return self.client.chat.completions.create(**filled)


def check_models(target: Target) -> None:
    listed = {model.id for model in target.client.models.list()}
    assert {target.model, *target.adapters} <= listed


def check_greedy_is_transformers(target: Target) -> None:
    ref = reference(target.folder)
    for words in ("the red moon is bright.", "a", "silver morning letter " * 40):
        messages = [{"role": "system", "content": "river"}, {"role": "user", "content": words}]
        prompt = ref.prompt(messages)
        expected = ref.greedy(prompt, 32)
        answer = target.chat(messages=messages, max_tokens=32)
        assert whole(answer.choices[0].message.content) == ref.text(expected)
        assert answer.usage.prompt_tokens == len(prompt)
        if len(expected) == 32:
            assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 32
        else:
            assert answer.choices[0].finish_reason == "stop"


def check_batches_change_nothing(target: Target) -> None:
    ref = reference(target.folder)
    prompts = [
        ref.prompt([{"role": "user", "content": f"the {word} river"}]) for word in "red green blue quiet".split()
    ]

    def complete(prompt: list[int]) -> str:
        request = {"model": target.model, "prompt": prompt, "max_tokens": 24, "temperature": 0}
        return whole(target.client.completions.create(**request).choices[0].text)

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(complete, prompts * 3))
    assert texts == [ref.text(ref.greedy(prompt, 24)) for prompt in prompts] * 3


def check_stream_is_the_same_text(target: Target) -> None:
    answer = target.chat(max_tokens=60)
    chunks = list(target.chat(max_tokens=60, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in deltas) == answer.choices[0].message.content
    assert deltas[0].delta.role == "assistant"
    assert [choice.finish_reason for choice in deltas if choice.finish_reason] == [answer.choices[0].finish_reason]
    assert chunks[-1].usage == answer.usage and not chunks[-1].choices
    assert len(deltas) > 3  # it came in pieces; an API server that has little of the CPU sends several tokens in one


def check_stop(target: Target) -> None:
    text = target.chat(max_tokens=40).choices[0].message.content
    stop = next(text[at : at + 3] for at in range(8, len(text)) if text[at : at + 3].isascii())
    answer = target.chat(max_tokens=40, stop=["never said", stop]).choices[0]
    assert answer.message.content == text[: text.index(stop)]
    assert answer.finish_reason == "stop"
    streamed = target.chat(max_tokens=40, stop=[stop], stream=True)
    joined = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    assert joined == text[: text.index(stop)]


def check_seed(target: Target) -> None:
    def say(seed: int) -> str:
        return str(target.chat(temperature=1.0, seed=seed, max_tokens=16).choices[0].message.content)

    assert say(7) == say(7)
    assert len({say(seed) for seed in range(4)}) > 1


def check_n(target: Target) -> None:
    answer = target.chat(n=3, temperature=1.0, seed=5, max_tokens=16)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    streams: dict[int, str] = {0: "", 1: "", 2: ""}
    for chunk in target.chat(n=3, temperature=1.0, seed=5, max_tokens=16, stream=True):
        for choice in chunk.choices:
            streams[choice.index] += choice.delta.content or ""
    assert list(streams.values()) == [choice.message.content for choice in answer.choices]


def check_penalties(target: Target) -> None:
    ref = reference(target.folder)
    prompt = ref.prompt(MESSAGES)
    for frequency, presence in ((2.0, 0.0), (0.0, 2.0), (0.5, -1.0)):
        expected = ref.text(ref.greedy(prompt, 40, frequency, presence))
        answer = target.chat(max_tokens=40, frequency_penalty=frequency, presence_penalty=presence)
        assert whole(answer.choices[0].message.content) == expected


def check_logprobs(target: Target) -> None:
    import torch

    ref = reference(target.folder)
    prompt = ref.prompt(MESSAGES)
    answer = target.chat(logprobs=True, top_logprobs=5, max_tokens=12)
    ids = ref.greedy(prompt, 12)
    assert ref.text(ids) == whole(answer.choices[0].message.content)
    logs = torch.log_softmax(ref.logits(prompt + ids), dim=-1)[len(prompt) - 1 :]
    content = answer.choices[0].logprobs.content
    expected = [float(logs[place, token]) for place, token in enumerate(ids)]
    assert [entry.logprob for entry in content[: len(ids)]] == pytest.approx(expected, abs=1e-4)
    for place, entry in enumerate(content[: len(ids)]):
        best = logs[place].topk(5).values.tolist()
        assert [top.logprob for top in entry.top_logprobs][:5] == pytest.approx(best, abs=1e-4)
        assert entry.top_logprobs[0].token == entry.token


def check_completions(target: Target) -> None:
    ref = reference(target.folder)
    prompts = ["the red moon is", "seven silver"]
    request = {"model": target.model, "max_tokens": 12, "temperature": 0, "logprobs": 1}
    answer = target.client.completions.create(prompt=prompts, **request)
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        ids = [int(token) for token in ref.tokenizer(prompt)["input_ids"]]
        assert whole(choice.text) == ref.text(ref.greedy(ids, 12))
        assert len(choice.logprobs.token_logprobs) == len(choice.logprobs.tokens)
        by_ids = target.client.completions.create(prompt=ids, **request)
        assert by_ids.choices[0].text == choice.text
    streamed = target.client.completions.create(prompt=prompts[0], stream=True, **request)
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == answer.choices[0].text


def check_forced_tools(target: Target) -> None:
    for choice in ({"type": "function", "function": {"name": "paint"}}, "required"):
        for seed in range(3):
            request = {"tools": TOOLS, "tool_choice": choice, "temperature": 1.0, "seed": seed, "max_tokens": 2000}
            message = target.chat(**request).choices[0].message
            for call in message.tool_calls:
                schema = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
                jsonschema.validate(json.loads(call.function.arguments), schema[call.function.name])
                assert choice == "required" or call.function.name == "paint"
            assert message.tool_calls and all(call.id for call in message.tool_calls)


def check_forced_tools_stream(target: Target) -> None:
    choice = {"type": "function", "function": {"name": "paint"}}
    request = {"tools": TOOLS, "tool_choice": choice, "temperature": 1.0, "seed": 1, "max_tokens": 300}
    called = target.chat(**request).choices[0].message.tool_calls[0].function
    names, arguments = [], ""
    for chunk in target.chat(stream=True, **request):
        for call in (chunk.choices[0].delta.tool_calls or []) if chunk.choices else []:
            names += [call.function.name] if call.function.name else []
            arguments += call.function.arguments or ""
    assert names == [called.name]
    assert json.loads(arguments) == json.loads(called.arguments)


def check_auto_tools(target: Target) -> None:
    """A random model calls nothing by itself, so the text is forced; that it is a call is found by the parser."""
    text = '<tool_call>\n{"name": "paint", "arguments": {"colour": "red", "count": 7}}\n</tool_call>'
    forced = {"structured_outputs": {"regex": re.escape(text)}}
    answer = target.chat(tools=TOOLS, tool_choice="auto", max_tokens=300, extra_body=forced).choices[0]
    (call,) = answer.message.tool_calls
    assert call.function.name == "paint"
    assert json.loads(call.function.arguments) == {"colour": "red", "count": 7}
    assert answer.finish_reason == "tool_calls" and not answer.message.content
    again = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [call.model_dump(exclude_none=True)]}]
    again.append({"role": "tool", "tool_call_id": call.id, "content": "done"})
    assert target.chat(messages=again, tools=TOOLS).choices[0].finish_reason in ("stop", "length")
    plain = target.chat(tools=TOOLS, tool_choice="none", max_tokens=300, extra_body=forced).choices[0].message
    assert plain.content == text and not plain.tool_calls


def check_json_schema(target: Target) -> None:
    for seed in range(3):
        form = {"type": "json_schema", "json_schema": {"name": "stone", "schema": SCHEMA, "strict": True}}
        answer = target.chat(response_format=form, temperature=1.0, seed=seed, max_tokens=400).choices[0]
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.message.content), SCHEMA)


def check_adapters(target: Target) -> None:
    base = reference(target.folder)
    prompt = base.prompt(MESSAGES)
    texts = {target.model: base.text(base.greedy(prompt, 24))}
    for name, folder in target.adapters.items():
        adapted = reference(target.folder, folder)
        texts[name] = adapted.text(adapted.greedy(prompt, 24))
    assert len(set(texts.values())) == len(texts) >= 2

    def say(name: str) -> str:
        return whole(target.chat(model=name, max_tokens=24).choices[0].message.content)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:  # several adapters in one batch
        assert list(pool.map(say, list(texts) * 3)) == list(texts.values()) * 3


def check_adapters_at_run_time(target: Target) -> None:
    assert target.load_adapter and target.unload_adapter and target.spare
    adapted = reference(target.folder, target.spare)
    expected = adapted.text(adapted.greedy(adapted.prompt(MESSAGES), 24))
    for _ in range(2):  # a name that was unloaded may be loaded again
        target.load_adapter("spare", target.spare)
        assert whole(target.chat(model="spare", max_tokens=24).choices[0].message.content) == expected
        assert "spare" in {model.id for model in target.client.models.list()}
        target.unload_adapter("spare")
        with pytest.raises(openai.NotFoundError):
            target.chat(model="spare")


def check_errors(target: Target) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        target.chat(model="nobody")
    too_long = "the red " * MAX_LEN
    with pytest.raises(openai.BadRequestError) as long:
        target.chat(messages=[{"role": "user", "content": too_long}])
    assert str(MAX_LEN) in str(long.value)
    wrong: list[dict[str, Any]] = [{"temperature": -1}, {"messages": []}, {"n": 0}, {"top_p": 2}, {"logit_bias": "red"}]
    raised = [unknown, long]
    for request in wrong:
        with pytest.raises(openai.BadRequestError) as error:
            target.chat(**request)
        raised.append(error)
    for error in raised:
        body = error.value.body
        assert isinstance(body, dict) and isinstance(body["message"], str) and body["message"], body
        assert {"message", "type", "code"} <= body.keys()
    no_text = httpx.post(
        f"{target.url}/v1/chat/completions",
        content=b'{"messages": "\xff"}',
        headers={"content-type": "application/json"},
        timeout=60,
    )
    assert no_text.status_code == 400 and no_text.json()["error"]["message"]
    assert target.chat().choices  # none of it did harm


def check_leaving_ends_generation(target: Target) -> None:
    """Without cancellation the sequences would run for half a minute and more."""
    request = {"max_tokens": MAX_LEN - 200, "extra_body": {"ignore_eos": True}, "n": 2, "temperature": 1.0}
    stream = target.chat(stream=True, **request)
    for _, _chunk in zip(range(6), stream, strict=False):
        pass
    _wait(lambda: target.running() == 2)
    stream.close()
    _wait(lambda: target.running() == 0)
    with pytest.raises(openai.APITimeoutError):
        target.client.with_options(timeout=2).chat.completions.create(model=target.model, messages=MESSAGES, **request)
    _wait(lambda: target.running() == 0)


def _wait(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def check_embeddings(target: Target) -> None:
    """The hidden state of the last token, of length 1."""
    import torch

    ref = reference(target.folder)
    texts = ["the red moon is bright.", "seven", "quiet letter window " * 10]
    answer = target.client.embeddings.create(model=target.model, input=texts, encoding_format="float")
    for text, given in zip(texts, answer.data, strict=True):
        ids = torch.tensor([ref.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            hidden = ref.model.model(ids).last_hidden_state[0, -1]
        expected = torch.nn.functional.normalize(hidden, dim=0)
        found = torch.tensor(given.embedding)
        assert float(found.norm()) == pytest.approx(1, abs=1e-4)
        assert float(found @ expected) == pytest.approx(1, abs=1e-5)
    coded = target.client.embeddings.create(model=target.model, input=texts[0])  # base64 on the wire
    assert coded.data[0].embedding == pytest.approx(answer.data[0].embedding, abs=1e-6)
    assert answer.usage.prompt_tokens == sum(len(ref.tokenizer(text)["input_ids"]) for text in texts)


def check_embedding_errors(target: Target) -> None:
    with pytest.raises(openai.NotFoundError):
        target.client.embeddings.create(model="nobody", input="x")
    with pytest.raises(openai.BadRequestError):
        target.client.embeddings.create(model=target.model, input="the red " * MAX_LEN)
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)):
        target.chat()


EMBEDDING_CHECKS = (check_embeddings, check_embedding_errors)
CHECKS = tuple(
    value for name, value in list(globals().items()) if name.startswith("check_") and value not in EMBEDDING_CHECKS
)
