"""What the endpoints that generate have in common: the served model, choices that run side by side, event streams."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from swift_dist.serving.hf.asked import Defaults
from swift_dist.serving.hf.failures import RequestError, bad_request, model_not_found
from swift_dist.serving.hf.metrics import Metrics
from swift_dist.serving.hf.prompts import ChatPrompts
from swift_dist.serving.hf.requests import (
    Event,
    Finished,
    GeneratorFailed,
    Prompt,
    RequestFailed,
    Sampling,
    TextGenerator,
    Token,
)
from swift_dist.serving.options import ServedModel
from swift_dist.serving.tool_parsers.base import Schemas, ToolParser

log = logging.getLogger(__name__)
T = TypeVar("T")

Streams = Sequence[AsyncIterator[Event]]
Events = AsyncIterator[tuple[int, Event]]


@dataclass
class Serving:
    """The served model, as the endpoints see it.

    Attributes:
        tools: reads the model's calls of tools; None where no way is known.
        reasoning: the tags around its thinking; None where it has none.
        failed: why the generator is dead.
        ending: keeps what `end_soon` began until it is done.
    """

    served: ServedModel
    generator: TextGenerator
    prompts: ChatPrompts
    defaults: Defaults
    metrics: Metrics
    tools: Callable[[Schemas], ToolParser] | None
    reasoning: tuple[str, str] | None
    failed: str = ""
    special_tokens: frozenset[str] = field(default_factory=frozenset)
    ending: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def tokenizer(self) -> Any:
        return self.generator.tokenizer

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may call the model: its own name first, then its adapters'."""
        return (self.served.name, *self.generator.adapters)

    def adapter(self, model: str | None) -> str | None:
        """The adapter that a request's ``model`` names; None for the model itself.

        Raises:
            RequestError: 404.
        """
        if model is None or model == self.served.name:
            return None
        if model not in self.generator.adapters:
            raise model_not_found(model, self.names)
        return model

    def start(
        self, prompt: list[int], samplings: Sequence[Sampling], adapter: str | None, default: int | None = None
    ) -> Streams:
        """Begin as many answers to a prompt as there are samplings.

        Args:
            default: tokens of an answer whose sampling names no limit, as far as the context has room for them (None:
                what the model's generation_config.json says, or as many as there is room for).

        Raises:
            RequestError: the generator refuses the request; none of its answers is begun.
        """
        streams: list[AsyncIterator[Event]] = []
        default = default or self.defaults.max_new_tokens
        room = self.generator.model_max_length - len(prompt)
        try:
            for sampling in samplings:
                if sampling.max_tokens is None and default is not None:
                    sampling = replace(sampling, max_tokens=max(min(default, room), 1))
                streams.append(self.generator.submit(prompt, sampling, adapter))
        except (ValueError, KeyError, GeneratorFailed) as error:
            self.end_soon(streams)
            if isinstance(error, GeneratorFailed):
                raise self.dead(error) from None
            if isinstance(error, KeyError):  # unloaded between the look-up and now
                raise model_not_found(str(adapter), self.names) from None
            raise bad_request(str(error)) from None
        return streams

    def end_soon(self, streams: Streams) -> None:
        """`end`, where nothing can be awaited."""
        task = asyncio.get_running_loop().create_task(end(streams))
        self.ending.add(task)
        task.add_done_callback(self.ending.discard)

    def dead(self, error: GeneratorFailed) -> RequestError:
        """Remember that nothing will be answered any more; /health says so from now on."""
        self.failed = self.failed or str(error) or "the engine has failed"
        return RequestError(503, f"The engine has failed: {self.failed}", code="engine_failed")


async def side_by_side(streams: Streams, metrics: Metrics, prompts: int = 1) -> Events:
    """The events of several answers as they come, each with the number of its answer; counted.

    Args:
        streams: of every prompt the same number of answers, prompt by prompt.
    """
    clocks, each = [metrics.clock() for _ in streams], len(streams) // prompts
    async for index, event in _merged(streams):
        if isinstance(event, Token):
            clocks[index].token()
        elif isinstance(event, Finished):
            clocks[index].end(event.reason, event.prompt_tokens if index % each == 0 else 0)
            metrics.prefix_cache_queries.inc(event.prompt_tokens)
            metrics.prefix_cache_hits.inc(event.cached_tokens)
        yield index, event


async def _merged(streams: Streams) -> Events:
    if len(streams) == 1:
        async for event in streams[0]:
            yield 0, event
        return
    queue: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue()

    async def pump(index: int, stream: AsyncIterator[Event]) -> None:
        try:
            async for event in stream:
                queue.put_nowait((index, event))
        except Exception as error:
            queue.put_nowait((index, error))
        else:
            queue.put_nowait((index, None))

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            index, told = await queue.get()
            if isinstance(told, Exception):
                raise told
            if told is None:
                left -= 1
            else:
                yield index, told
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class Answer:
    """One answer in one piece."""

    tokens: list[Token]
    finished: Finished
    prompt: Prompt | None = None


async def whole(serving: Serving, streams: Streams, prompts: int = 1) -> list[Answer]:
    """Answers in one piece; cancelled, they are given up. The arguments are those of `side_by_side`."""
    answers = [Answer([], Finished("stop", None, 0, 0)) for _ in streams]
    try:
        async for index, event in side_by_side(streams, serving.metrics, prompts):
            if isinstance(event, Token):
                answers[index].tokens.append(event)
            elif isinstance(event, Finished):
                answers[index].finished = event
            else:
                answers[index].prompt = event
    except (GeneratorFailed, RequestFailed) as error:
        raise _refusal(serving, error) from None
    finally:
        await end(streams)
    return answers


def _refusal(serving: Serving, error: GeneratorFailed | RequestFailed) -> RequestError:
    """What the client is told."""
    if isinstance(error, GeneratorFailed):
        return serving.dead(error)
    return RequestError(500, f"The answer could not be computed: {error}", code="generation_failed")


async def end(streams: Streams) -> None:
    """Cancel whatever of the answers still runs. Also for answers that nobody has begun to read."""
    for stream in streams:
        with contextlib.suppress(RuntimeError, GeneratorFailed):
            await stream.aclose()  # type: ignore[attr-defined]


def usage_of(finished: Sequence[Finished], prompts: int = 1) -> dict[str, int]:
    """Tokens of prompts (each once, however many answers) and answers.

    Args:
        finished: of every prompt the same number of answers, prompt by prompt.
    """
    each = len(finished) // prompts
    prompt_tokens = sum(one.prompt_tokens for one in finished[::each])
    completion_tokens = sum(one.completion_tokens for one in finished)
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


async def streamed(
    serving: Serving,
    request: Request,
    streams: Streams,
    chunks: Callable[[Events], AsyncIterator[dict[str, Any]]],
    prompts: int = 1,
) -> EventStream:
    """A response whose head goes out with the first event: what fails before that has a status of its own, and a
    replica that is lost before that has sent nothing, so that a proxy may ask another one.

    Args:
        chunks: the answers' events -> the JSON values of the response's.
        prompts: as of `side_by_side`.

    Raises:
        RequestError: the answer failed before its first event.
        ClientGone: the client left before that.
    """
    events = side_by_side(streams, serving.metrics, prompts)

    async def first() -> tuple[int, Event]:
        return await anext(events)

    begun = False
    try:
        event = await unless_gone(request, first())
        begun = True
    except (GeneratorFailed, RequestFailed) as error:
        raise _refusal(serving, error) from None
    finally:
        if not begun:
            await asyncio.shield(end(streams))

    async def every() -> Events:
        yield event
        async for later in events:
            yield later

    return EventStream(serving, chunks(every()), streams)


class EventStream(StreamingResponse):
    """Server-sent events; when it ends, by whatever, so do the answers.

    Args:
        chunks: the events' JSON values.
        streams: what is generated for them.
    """

    def __init__(self, serving: Serving, chunks: AsyncIterator[dict[str, Any]], streams: Streams) -> None:
        self._streams = streams
        # no proxy may keep events back
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_events(serving, chunks), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # The client may be gone before the first event is asked for: then no generator above has begun.
            await asyncio.shield(end(self._streams))


async def _events(serving: Serving, chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    try:
        async for chunk in chunks:
            yield event_of(chunk)
    except (GeneratorFailed, RequestFailed) as error:
        yield event_of(_refusal(serving, error).body)
        return
    except Exception:
        log.exception("a stream broke")
        yield event_of(RequestError(500, "The server failed while it generated the answer").body)
        return
    yield "data: [DONE]\n\n"


def event_of(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; when the client leaves first, the work is cancelled.

    Raises:
        ClientGone: it has left.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass  # the rest of the body, which has been read
