"""What fails in the hf engine: one request, those computed with it, or the engine; and what the client is told."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
import transformers
from chat_model import save_chat_model
from generating import Answer, asked, generated, prompts

from swift_dist.serving.hf.app import create_app
from swift_dist.serving.hf.generation import Serving
from swift_dist.serving.hf.generator import Generator
from swift_dist.serving.hf.requests import Finished, GeneratorFailed, Guide, RequestFailed, Sampling, Token
from swift_dist.serving.hf.server import load
from swift_dist.serving.options import EngineOptions, ServedModel

GREEDY = Sampling(temperature=0, max_tokens=12, ignore_eos=True)
USER = [{"role": "user", "content": "the red moon is"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    return [generated(model, prompt, GREEDY.max_tokens) for prompt in prompts(4, 30)]


def started(folder: Path, adapters: dict[str, str] | None = None, **options: Any) -> Generator:
    return Generator(ServedModel("tiny", str(folder), EngineOptions(dtype="fp32", **options), adapters or {}))


@pytest.fixture
def generator(folder: Path) -> Iterator[Generator]:
    generator = started(folder)
    yield generator
    generator.close()


def outcomes(generator: Generator, requests: list[tuple]) -> list[Answer | BaseException]:
    async def every() -> list[Answer | BaseException]:
        return await asyncio.gather(*(asked(generator, *request) for request in requests), return_exceptions=True)

    return asyncio.run(every())


class Once:
    """Calls a function, and raises instead at one of its calls."""

    def __init__(self, function: Callable[..., Any], at: int, error: Exception) -> None:
        self._function, self._left, self._error = function, at, error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            raise self._error
        return self._function(*args, **kwargs)


@pytest.mark.parametrize("at", [1, 5])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory.\nTried"), ValueError("odd"), MemoryError()]
)
def test_a_forward_that_fails_ends_its_requests_and_nothing_else(
    generator: Generator, expected: list[list[int]], error: Exception, at: int
) -> None:
    """In prefill and in decoding; what comes afterwards is answered with the blocks that became free."""
    free = generator._runner.pool.free_blocks
    generator._runner.forward = Once(generator._runner.forward, at, error)
    found = outcomes(generator, [(prompt, GREEDY) for prompt in prompts(4, 30)])
    failed = [answer for answer in found if isinstance(answer, RequestFailed)]
    assert failed
    for ids, answer in zip(expected, found, strict=True):  # those that came with a later step
        assert answer in failed or answer.ids == ids
    for answer in failed:
        assert str(answer) == f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    assert (generator.running, generator.waiting, generator._runner.pool.free_blocks) == (0, 0, free)
    assert [a.ids for a in outcomes(generator, [(prompt, GREEDY) for prompt in prompts(4, 30)])] == expected
    assert generator.error is None


def test_a_row_that_fails_after_the_forward_fails_alone(generator: Generator, expected: list[list[int]]) -> None:
    take = generator._scheduler._shown

    def shown(row: Any, text: str, early: bool) -> Any:
        if row.tokens[: row.prompt] == prompts(4, 30)[2] and row.sampler.length == 3:
            raise IndexError("no such piece")
        return take(row, text, early)

    generator._scheduler._shown = shown
    found = outcomes(generator, [(prompt, GREEDY) for prompt in prompts(4, 30)])
    assert isinstance(found[2], RequestFailed)
    assert [answer.ids for answer in found[:2] + found[3:]] == expected[:2] + expected[3:]


def test_a_guide_that_gives_up_fails_its_request(generator: Generator, expected: list[list[int]]) -> None:
    """llguidance allows nothing but the end then: the answer would seem to be a short one."""
    made = generator._guides.matcher

    def matcher(guide: Guide) -> Any:
        found = made(guide)
        found.consume_token(3)  # which the guide does not allow
        assert found.is_error()
        return found

    generator._guides.matcher = matcher
    guided = dataclasses.replace(GREEDY, guide=Guide("regex", "[a-z]{5,9}"))
    first, second = outcomes(generator, [(prompts(4, 30)[0], guided), (prompts(4, 30)[1], GREEDY)])
    assert isinstance(first, RequestFailed)
    assert "guide" in str(first)
    assert second.ids == expected[1]


def test_adapters_are_as_before_after_a_batch_of_them_failed(folder: Path, tmp_path: Path) -> None:
    """PEFT's hooks of the rows' adapters would stay in its layers, and change the answers of whoever comes next."""
    places = {}
    for seed, name in enumerate(("one", "two")):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        torch.manual_seed(seed)
        for weight in model.parameters():
            if weight.requires_grad:
                torch.nn.init.normal_(weight, 0.0, 0.3)
        places[name] = str(tmp_path / name)
        model.save_pretrained(places[name])
    generator = started(folder, places)
    try:
        requests = [(prompts(4, 30)[1], GREEDY, name) for name in (None, "one", "two")]
        before = [answer.ids for answer in outcomes(generator, requests)]
        assert len({tuple(ids) for ids in before}) == 3
        layer = generator._loaded.model.model.layers[1].mlp
        layer.forward = Once(layer.forward, 3, ValueError("odd"))
        found = outcomes(generator, requests)
        assert any(isinstance(answer, RequestFailed) for answer in found)
        for some in (slice(0, 1), slice(0, 3), slice(1, 2)):
            assert [answer.ids for answer in outcomes(generator, requests[some])] == before[some]
        assert generator.error is None
    finally:
        generator.close()


def _broken_device(generator: Generator) -> None:
    def poisoned(*_: Any, **__: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    generator._loaded.model.model.forward = poisoned


def _other_weights(generator: Generator) -> None:
    with torch.inference_mode():
        generator._loaded.model.lm_head.weight.mul_(-1)
    generator._runner.forward = Once(generator._runner.forward, 1, ValueError("odd"))


@pytest.mark.parametrize(("harm", "said"), [(_broken_device, "device-side assert"), (_other_weights, "other logits")])
def test_a_model_that_is_not_what_it_was_ends_the_engine(folder: Path, harm: Callable, said: str) -> None:
    generator = started(folder)
    harm(generator)
    failed = outcomes(generator, [(prompts(4, 30)[1], GREEDY)])[0]
    assert isinstance(failed, RequestFailed)
    generator._thread.join(20)
    assert said in str(generator.error)
    with pytest.raises(GeneratorFailed, match=said):
        generator.submit([5], GREEDY)
    generator.close()


# what a client is told


class Held:
    """A generator whose answer comes once it is let go: an event, or an error."""

    running = waiting = 0
    model_max_length = 4096
    adapters = ()

    def __init__(self, tokenizer: Any, *events: Any) -> None:
        self.tokenizer, self._events = tokenizer, events
        self.go, self.asked, self.closed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def submit(self, prompt: list[int], sampling: Sampling, adapter: str | None = None) -> AsyncIterator[Any]:
        return self._answer()

    async def _answer(self) -> AsyncIterator[Any]:
        self.asked.set()
        try:
            await self.go.wait()
            for event in self._events:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.closed.set()


@pytest.fixture(scope="module")
def real(folder: Path) -> Iterator[Serving]:
    serving = load(ServedModel("tiny", str(folder), EngineOptions(dtype="fp32")))
    yield serving
    serving.generator.close()


EVENTS = (Token(5, "moon", b"moon"), Finished("stop", None, 4, 1))
PATHS = {"/v1/chat/completions": {"messages": USER}, "/v1/completions": {"prompt": "the red", "echo": True}}


async def talk(app: Any, path: str, sent: list[dict[str, Any]], leave: asyncio.Event) -> None:
    """A streamed request by hand: httpx' transport would hide when the head is sent."""
    body = json.dumps({**PATHS[path], "stream": True}).encode()
    inbox = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if inbox:
            return inbox.pop()
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST"}
    scope |= {"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http"}
    scope |= {"headers": [(b"content-type", b"application/json")], "server": ("test", 80), "client": ("test", 1)}
    await app(scope, receive, send)


def streamed(real: Serving, path: str, *events: Any, go: bool = True) -> tuple[list[dict[str, Any]], bool]:
    """What the server has sent; whether something was sent before the answer was let go."""

    async def run() -> tuple[list[dict[str, Any]], bool]:
        held = Held(real.tokenizer, *events)
        sent: list[dict[str, Any]] = []
        leave = asyncio.Event()
        app = create_app(dataclasses.replace(real, generator=held))
        task = asyncio.create_task(talk(app, path, sent, leave))
        await held.asked.wait()
        for _ in range(20):  # whatever could be sent now
            await asyncio.sleep(0)
        early = bool(sent)
        (held.go if go else leave).set()
        await task
        await held.closed.wait()
        return sent, early

    return asyncio.run(asyncio.wait_for(run(), 30))


@pytest.mark.parametrize("path", PATHS)
def test_the_head_of_a_stream_goes_out_with_its_first_event(real: Serving, path: str) -> None:
    sent, early = streamed(real, path, *EVENTS)
    assert not early
    assert sent[0]["status"] == 200
    text = b"".join(message.get("body", b"") for message in sent).decode()
    assert "moon" in text
    assert text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RequestFailed("OutOfMemoryError: no room"), 500, "generation_failed"),
        (GeneratorFailed("gone"), 503, "engine_failed"),
        (KeyError("ours"), 500, None),
    ],
)
def test_what_fails_before_the_first_event_has_a_status(
    real: Serving, path: str, error: Exception, status: int, code: str | None
) -> None:
    with pytest.raises(KeyError) if isinstance(error, KeyError) else pytest.MonkeyPatch.context():
        sent, early = streamed(real, path, error)
        assert not early
        assert sent[0]["status"] == status
        told = json.loads(b"".join(message.get("body", b"") for message in sent))["error"]
        assert told["code"] == code
        assert str(error) in told["message"]


@pytest.mark.parametrize("path", PATHS)
def test_a_client_that_leaves_before_the_first_event_is_not_answered(real: Serving, path: str) -> None:
    sent, _ = streamed(real, path, *EVENTS, go=False)
    assert sent[0]["status"] == 499


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_failed_has_an_error_of_openais_shape(folder: Path, stream: bool) -> None:
    """Before its first token, within a stream, and in one piece; the next one is answered, and /health is well."""
    serving = load(ServedModel("tiny", str(folder), EngineOptions(dtype="fp32")))

    async def run() -> None:
        transport = httpx.ASGITransport(create_app(serving))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            body = {"messages": USER, "max_tokens": 30, "stream": stream, "logit_bias": {"2": -100}}
            for at in (1, 9):
                forward = serving.generator._runner.forward
                serving.generator._runner.forward = Once(forward, at, torch.OutOfMemoryError("no room"))
                answer = await client.post("/v1/chat/completions", json=body)
                if stream and at > 1:
                    assert answer.status_code == 200
                    last = [line for line in answer.text.splitlines() if line][-1]
                    error = json.loads(last.removeprefix("data: "))["error"]
                else:
                    assert answer.status_code == 500
                    error = answer.json()["error"]
                assert (error["type"], error["code"]) == ("server_error", "generation_failed")
                assert "no room" in error["message"]
            assert (await client.post("/v1/chat/completions", json={**body, "stream": False})).status_code == 200
            assert (await client.get("/health")).status_code == 200

    try:
        asyncio.run(run())
    finally:
        serving.generator.close()
