"""``POST /v1/chat/completions``"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from swift_dist.serving.hf.answers import ChatAnswer, NamedArguments, RequiredCalls, chat_logprobs, message_of
from swift_dist.serving.hf.asked import (
    checked_length,
    choices_of,
    forced_guide,
    sampling_of,
    schema_of,
    strict_guide,
    thinking_before,
)
from swift_dist.serving.hf.failures import bad_request
from swift_dist.serving.hf.generation import Events, Serving, streamed, unless_gone, usage_of, whole
from swift_dist.serving.hf.prompts import Rendered
from swift_dist.serving.hf.protocol import ChatRequest, NamedTool, Tool
from swift_dist.serving.hf.requests import Finished, Sampling, Token
from swift_dist.serving.reasoning import splitter_of
from swift_dist.serving.tool_parsers.base import ToolParser


@dataclass(frozen=True)
class Plan:
    """How one request is answered.

    Args:
        choice: ``tool_choice`` with its default.
        tools: those that may be called.
    """

    body: ChatRequest
    choice: Any
    tools: list[Tool]
    prompt: Rendered
    samplings: list[Sampling]

    @property
    def forced(self) -> bool:
        return self.choice == "required" or isinstance(self.choice, NamedTool)


async def chat(serving: Serving, request: Request, body: ChatRequest, request_id: str) -> Response:
    """Answer a conversation."""
    adapter = serving.adapter(body.model)
    # rendering and tokenising a long conversation takes a while, in which others' tokens go on
    plan = await asyncio.to_thread(_plan, serving, body)
    streams = serving.start(plan.prompt.ids, plan.samplings, adapter)
    head = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": body.model or serving.served.name}
    if body.stream:
        return await streamed(serving, request, streams, lambda events: _chunks(serving, plan, events, head))
    answers = await unless_gone(request, whole(serving, streams))
    choices = []
    for index, answer in enumerate(answers):
        writer = _writer(serving, plan)
        deltas = [*(writer.feed(token) for token in answer.tokens), writer.finish()]
        choices.append(
            {
                "index": index,
                "message": message_of(deltas),
                "logprobs": chat_logprobs(answer.tokens) if body.logprobs else None,
                "finish_reason": _reason(plan, writer, answer.finished),
                "stop_reason": answer.finished.stop,
            }
        )
    usage = usage_of([answer.finished for answer in answers])
    return JSONResponse({**head, "object": "chat.completion", "choices": choices, "usage": usage})


def _plan(serving: Serving, body: ChatRequest) -> Plan:
    choice = body.tool_choice or ("auto" if body.tools else "none")
    tools = list(body.tools or ()) if choice != "none" else []
    if choice == "auto" and tools and serving.tools is None:
        raise bad_request(
            'tool_choice "auto" needs to know how the model writes calls, which its chat template does not tell: serve '
            "it with --tool_call_parser or --agent_format",
            "tool_choice",
        )
    prompt = serving.prompts.render(body, tools)
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    checked_length(len(prompt.ids), max_tokens, serving.generator.model_max_length, "messages")
    parser = _parser(serving, choice, tools)
    sampling = sampling_of(
        body,
        serving.defaults,
        max_tokens=max_tokens,
        stop=parser.stop if parser else (),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    markers = (*(parser.markers if parser else ()), *(serving.reasoning or ()))
    if any(token in marker for marker in markers for token in serving.special_tokens):
        # they order calls and thinking, and would be missing
        sampling = replace(sampling, skip_special_tokens=False)
    parallel = body.parallel_tool_calls is not False
    calls = strict_guide(tools, parser, parallel) if choice == "auto" else forced_guide(choice, tools, parallel)
    if calls is not None and sampling.guide is not None:
        both = "strict tools" if choice == "auto" else "forced calls"
        raise bad_request(f"{both} and response_format both say what the text must be", "tool_choice")
    guide = calls or sampling.guide
    if guide is not None:
        guide = replace(guide, thinking=thinking_before(serving.reasoning, prompt.text))
        sampling = replace(sampling, guide=guide)
    return Plan(body, choice, tools, prompt, choices_of(sampling, body.n or 1))


def _parser(serving: Serving, choice: Any, tools: list[Tool]) -> ToolParser | None:
    if isinstance(choice, NamedTool):
        return NamedArguments(choice.function.name)
    if choice == "required":
        return RequiredCalls()
    if not tools or serving.tools is None:
        return None
    return serving.tools({tool.function.name: schema_of(tool) for tool in tools})


def _writer(serving: Serving, plan: Plan) -> ChatAnswer:
    return ChatAnswer(
        splitter_of(serving.reasoning, plan.prompt.text) if serving.reasoning else None,
        _parser(serving, plan.choice, plan.tools),
        parallel=plan.body.parallel_tool_calls is not False,
        show_reasoning=plan.body.include_reasoning,
    )


def _reason(plan: Plan, writer: ChatAnswer, finished: Finished) -> str:
    """``tool_calls`` where the model chose to call; a tool that was named ends with ``stop``, as OpenAI's does."""
    if writer.called and finished.reason == "stop" and not isinstance(plan.choice, NamedTool):
        return "tool_calls"
    return finished.reason


async def _chunks(serving: Serving, plan: Plan, events: Events, head: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    body, count = plan.body, len(plan.samplings)
    counted = body.stream_options is not None and bool(body.stream_options.include_usage)
    writers = [_writer(serving, plan) for _ in range(count)]
    untold: list[list[Token]] = [[] for _ in range(count)]  # tokens whose logprobs no chunk has shown
    finished: list[Finished] = []

    def chunk(index: int, delta: dict[str, Any], end: Finished | None = None) -> dict[str, Any]:
        logprobs = chat_logprobs(untold[index]) if body.logprobs and untold[index] else None
        untold[index] = []
        reason = _reason(plan, writers[index], end) if end else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        if end:
            choice["stop_reason"] = end.stop
        made = {**head, "object": "chat.completion.chunk", "choices": [choice]}
        return {**made, "usage": None} if counted else made

    for index in range(count):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, event in events:
        if isinstance(event, Token):
            untold[index].append(event)
            delta = writers[index].feed(event)
            if delta:
                yield chunk(index, delta.fields())
        elif isinstance(event, Finished):
            finished.append(event)
            yield chunk(index, writers[index].finish().fields(), event)
    if counted:
        yield {**head, "object": "chat.completion.chunk", "choices": [], "usage": usage_of(finished)}
