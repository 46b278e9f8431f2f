"""The hf engine's server as a process, asked by the official client: what is its own beside the engines' suite."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import jsonschema
import openai
import pytest
import torch

from swift_dist.serving.engines.hf import ENGINE
from swift_dist.serving.engines.process import EngineProcess
from swift_dist.serving.options import EngineOptions, ServedModel
from tests.support.chat_model import save_chat_model

USER = [{"role": "user", "content": "the red moon is"}]
CONTEXT = 2048
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {
            "type": "object",
            "properties": {"days": {"$ref": "#/$defs/days"}, "sure": {"type": "boolean"}},
            "required": ["days", "sure"],
            "additionalProperties": False,
            "$defs": {"days": {"enum": [1, 2, 3]}},
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model"), max_position_embeddings=CONTEXT)


@contextlib.contextmanager
def running(folder: Path, log: Path, **options: object) -> Iterator[EngineProcess]:
    served = ServedModel("tiny", str(folder), EngineOptions(dtype="fp32", **options))
    ENGINE.check(served)
    with EngineProcess(ENGINE, served, log=log) as process:
        process.start()
        process.wait_ready()
        yield process


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory) -> Iterator[EngineProcess]:
    log = tmp_path_factory.mktemp("log") / "log"
    with running(folder, log, agent_format="hermes", engine_args=("--grace", "2")) as process:
        yield process


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def http(server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def model(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def greedy(model, prompt: list[int], count: int) -> list[int]:
    found = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=1)
    return found[0, len(prompt) :].tolist()


def test_a_chat_is_the_chat_template_and_greedy_decoding(client, model):
    network, tokenizer = model
    prompt = tokenizer.apply_chat_template(USER, add_generation_prompt=True, tokenize=True, return_dict=False)
    answer = client.chat.completions.create(model="tiny", messages=USER, temperature=0, max_tokens=12)
    expected = greedy(network, prompt, 12)
    assert answer.choices[0].message.content == tokenizer.decode(expected, skip_special_tokens=True)
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(expected)


def test_a_stream_adds_up_to_the_answer(client):
    asked = {"model": "tiny", "messages": USER, "seed": 5, "n": 2, "max_tokens": 20, "logprobs": True}
    whole = client.chat.completions.create(**asked)
    texts, tokens, reasons = ["", ""], [[], []], ["", ""]
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert [choice.delta.role for chunk in chunks[:2] for choice in chunk.choices] == ["assistant", "assistant"]
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
        reasons[choice.index] += choice.finish_reason or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]
    for streamed, choice in zip(tokens, whole.choices, strict=True):
        assert [one.token for one in streamed] == [one.token for one in choice.logprobs.content]
        expected = [one.logprob for one in choice.logprobs.content]
        assert [one.logprob for one in streamed] == pytest.approx(expected, abs=1e-4)
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_echo_with_logprobs_scores_the_prompt(client, model):
    """As lm-eval does it: nothing is generated, the prompt's tokens are scored."""
    network, tokenizer = model
    text = "the red moon is"
    ids = tokenizer(text)["input_ids"]
    with torch.no_grad():
        scores = network(torch.tensor([ids])).logits[0].log_softmax(-1)
    for prompt in (text, ids):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=0, echo=True, logprobs=1)
        shown = answer.choices[0].logprobs
        assert answer.choices[0].text == text
        assert shown.tokens == [tokenizer.decode([token]) for token in ids]
        assert shown.token_logprobs[0] is None
        expected = [scores[place, token].item() for place, token in enumerate(ids[1:])]
        assert shown.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
        assert shown.text_offset == [len(tokenizer.decode(ids[:k])) for k in range(len(ids))]
        assert answer.usage.completion_tokens == 0


def test_several_prompts_each_with_several_answers(client):
    answer = client.completions.create(model="tiny", prompt=["the red", "a bird"], n=2, echo=True, seed=1, max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[:6] for choice in answer.choices] == ["the re", "the re", "a bird", "a bird"]
    alone = client.completions.create(model="tiny", prompt="a bird", n=2, echo=True, seed=1, max_tokens=4)
    assert [choice.text for choice in answer.choices[2:]] == [choice.text for choice in alone.choices]


def test_best_of_are_the_most_probable(client):
    asked = {"model": "tiny", "prompt": "the red", "seed": 3, "max_tokens": 6, "logprobs": 0}
    several = client.completions.create(**asked, n=5).choices
    mean = {c.text: sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in several}
    best = client.completions.create(**asked, n=2, best_of=5).choices
    assert [choice.text for choice in best] == sorted(mean, key=lambda text: -mean[text])[:2]


@pytest.mark.parametrize("stream", [False, True])
def test_forced_calls_fit_their_schemas(client, stream):
    """A random model: without guiding, not one of these would."""
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        for seed in range(3):
            answer = client.chat.completions.create(
                model="tiny",
                messages=USER,
                tools=[WEATHER, NOW],
                tool_choice=choice,
                parallel_tool_calls=False,
                seed=seed,
                max_tokens=200,
                stream=stream,
            )
            calls, reason = added_up(answer) if stream else (answer.choices[0].message.tool_calls, None)
            reason = reason or answer.choices[0].finish_reason
            (call,) = calls
            name, arguments = call.function.name, json.loads(call.function.arguments)
            assert call.id.startswith("call_")
            schema = WEATHER["function"]["parameters"] if name == "weather" else {"maxProperties": 0}
            jsonschema.validate(arguments, schema)
            assert choice == "required" or name == "weather"
            assert reason == ("tool_calls" if choice == "required" else "stop")


def added_up(stream):
    calls, reason = [], None
    for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or ():
            if call.id:
                calls.append(call)
            else:
                calls[call.index].function.arguments += call.function.arguments
        reason = chunk.choices[0].finish_reason or reason
    return calls, reason


def test_json_schema(client):
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    for asked in (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}},
        {"extra_body": {"structured_outputs": {"json": schema}}},
    ):
        answer = client.chat.completions.create(model="tiny", messages=USER, max_tokens=100, **asked)
        jsonschema.validate(json.loads(answer.choices[0].message.content), schema)
    picked = client.chat.completions.create(
        model="tiny", messages=USER, extra_body={"structured_outputs": {"choice": ["moon", "river"]}}
    )
    assert picked.choices[0].message.content in ("moon", "river")


def test_an_answer_of_the_assistant_goes_on(client, http):
    messages = [*USER, {"role": "assistant", "content": "a silver"}]
    asked = {"temperature": 0, "max_tokens": 5}
    extra = {"add_generation_prompt": False, "continue_final_message": True}
    answer = client.chat.completions.create(model="tiny", messages=messages, **asked, extra_body=extra)
    ids = http.post("/tokenize", json={"messages": USER}).json()["tokens"]
    ids += http.post("/tokenize", json={"prompt": "a silver"}).json()["tokens"]
    text = http.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    assert text.endswith("assistant\na silver")
    assert (
        answer.choices[0].message.content
        == client.completions.create(model="tiny", prompt=ids, **asked).choices[0].text
    )


F = {"function": {"name": "f", "arguments": "{}"}}
BROKEN = {"function": {"name": "f", "arguments": "{"}}
WRONG = [
    ({"messages": []}, 400, "messages"),
    ({"messages": "hello"}, 400, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "role"),
    ({"messages": [{"role": "user"}]}, 400, "needs content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, "image_url"),
    ({"model": "nobody"}, 404, "'nobody' does not exist. There are: tiny"),
    ({"n": 0}, 400, "n"),
    ({"n": 129}, 400, "n"),
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": "warm"}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": CONTEXT}, 400, f"maximum context length is {CONTEXT} tokens"),
    ({"messages": [{"role": "user", "content": "moon " * 2100}]}, 400, "maximum context length"),
    ({"top_logprobs": 3}, 400, "logprobs"),
    ({"logit_bias": {"moon": 1}}, 400, "token ids"),
    ({"logit_bias": {"99999": 1}}, 400, "99999"),
    ({"stop": [""]}, 400, "empty stop"),
    ({"best_of": 2}, 400, "best_of"),
    ({"use_beam_search": True}, 400, "use_beam_search"),
    ({"stream_options": {"include_usage": True}}, 400, "stream"),
    ({"tool_choice": "required"}, 400, "needs tools"),
    ({"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "then"}}}, 400, "'then'"),
    ({"response_format": {"type": "json_schema"}}, 400, "json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "nothing"}}}},
        400,
        "nothing",
    ),
    ({"structured_outputs": {"regex": "(["}}, 400, "regex"),
    ({"chat_template_kwargs": {"tokenize": True}}, 400, "tokenize"),
    ({"continue_final_message": True}, 400, "assistant"),
    (
        {"messages": [*USER, {"role": "tool", "content": "r", "tool_calls": [F]}]},
        400,
        "calls",
    ),
    (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [BROKEN]}]},
        400,
        "arguments",
    ),
]


@pytest.mark.parametrize(("changed", "status", "said"), WRONG)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_said(http, changed, status, said, stream):
    if stream and "stream_options" in changed:
        return
    answer = http.post("/v1/chat/completions", json={"model": "tiny", "messages": USER, **changed, "stream": stream})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert said in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"messages": "\\ud800"}', b'{"temperature": NaN}', b"\xff"])
def test_what_is_no_json_is_refused(http, body):
    answer = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_other_refusals(http):
    for path, body, status in (
        ("/v1/completions", {"prompt": ""}, 400),
        ("/v1/completions", {"prompt": [[1], [99999]]}, 400),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400),
        ("/v1/embeddings", {"input": "a"}, 400),
        ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/nowhere"}, 404),
        ("/v1/load_lora_adapter", {"lora_name": "tiny", "lora_path": "/tmp"}, 400),
        ("/v1/unload_lora_adapter", {"lora_name": "a"}, 404),
        ("/v1/nothing", {}, 404),
    ):
        answer = http.post(path, json=body)
        assert answer.status_code == status, (path, answer.text)
        assert answer.json()["error"]["message"]


def test_a_request_keeps_its_id(http):
    answer = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.json()["id"] == "cmpl-mine-1"
    one, other = (http.get("/v1/models").headers["x-request-id"] for _ in range(2))
    assert one != other


def gauges(http, name: str) -> float:
    line = next(one for one in http.get("/metrics").text.splitlines() if one.startswith(f"swift_dist:{name} "))
    return float(line.split()[-1])


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_the_generation(server, http, stream):
    endless = {"prompt": "the red", "max_tokens": 1900, "ignore_eos": True, "n": 16, "stream": stream}
    generated = gauges(http, "generation_tokens_total")
    with httpx.Client(base_url=server.url, timeout=60 if stream else httpx.Timeout(60, read=0.5)) as leaving:
        asked = leaving.build_request("POST", "/v1/completions", json=endless)
        if stream:
            answer = leaving.send(asked, stream=True)
            lines = answer.iter_lines()  # kept: when it is forgotten, the answer is closed
            next(lines)
            assert server.load().running > 0
            answer.close()
        else:
            with pytest.raises(httpx.ReadTimeout):
                leaving.send(asked)
    until = time.monotonic() + 60
    while server.load().running and time.monotonic() < until:
        time.sleep(0.02)
    assert server.load().running == 0
    assert gauges(http, "generation_tokens_total") - generated < 16 * 1900


def test_metrics_count(http):
    names = ("prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_count")
    before = [gauges(http, name) for name in names]
    http.post("/v1/completions", json={"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True, "n": 2})
    assert [now - then for now, then in zip([gauges(http, name) for name in names], before, strict=True)] == [3, 8, 2]


def test_sigterm_lets_answers_end_and_breaks_off_those_that_take_longer(folder, tmp_path):
    """A short answer, and some that would take longer than the grace; none is refused that was taken."""
    with running(folder, tmp_path / "log", engine_args=("--grace", "3")) as process:
        ended: dict[str, str] = {}

        def ask(name: str, count: int, times: int) -> None:
            body = {"prompt": "the red", "max_tokens": count, "ignore_eos": True, "n": times, "stream": True}
            with httpx.stream("POST", f"{process.url}/v1/completions", json=body, timeout=60) as answer:
                ended[name] = [line for line in answer.iter_lines() if line][-1]

        threads = [
            threading.Thread(target=ask, args=("short", 20, 1)),
            threading.Thread(target=ask, args=("long", 2000, 8)),
        ]
        for thread in threads:
            thread.start()
        while process.load().running < (8 if "short" in ended else 9):
            time.sleep(0.01)
        begun = time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert ended["short"] == "data: [DONE]"
        assert "error" in json.loads(ended["long"].removeprefix("data: "))
        assert 3 <= time.monotonic() - begun < 50
