"""``POST /v1/completions``: prompts as they are, without a chat template."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from swift_dist.serving.hf.answers import completion_logprobs
from swift_dist.serving.hf.asked import checked_length, choices_of, sampling_of
from swift_dist.serving.hf.failures import RequestError, bad_request
from swift_dist.serving.hf.generation import Answer, Events, Serving, streamed, unless_gone, usage_of, whole
from swift_dist.serving.hf.protocol import CompletionRequest, Prompt
from swift_dist.serving.hf.requests import Finished, Sampling, Token
from swift_dist.serving.hf.requests import Prompt as PromptTokens

_DEFAULT_TOKENS = 16  # OpenAI's


@dataclass(frozen=True)
class Plan:
    """How one request is answered.

    Args:
        prompts: token ids.
        texts: what ``echo`` shows of them.
        samplings: one for each answer that is generated to a prompt.
    """

    body: CompletionRequest
    prompts: list[list[int]]
    texts: list[str]
    samplings: list[Sampling]


async def complete(serving: Serving, request: Request, body: CompletionRequest, request_id: str) -> Response:
    """Continue texts."""
    adapter = serving.adapter(body.model)
    plan = await asyncio.to_thread(_plan, serving, body)
    streams: list[Any] = []
    try:
        for prompt in plan.prompts:
            streams += serving.start(prompt, plan.samplings, adapter, default=_DEFAULT_TOKENS)
    except RequestError:
        serving.end_soon(streams)
        raise
    head = {
        "id": f"cmpl-{request_id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model or serving.served.name,
    }
    if body.stream:
        return await streamed(
            serving, request, streams, lambda events: _chunks(plan, events, head), prompts=len(plan.prompts)
        )
    answers = await unless_gone(request, whole(serving, streams, len(plan.prompts)))
    each, count = len(plan.samplings), body.n or 1
    choices: list[dict[str, Any]] = []
    for place, text in enumerate(plan.texts):
        for answer in _best(answers[place * each : (place + 1) * each], count):
            choices.append(_choice(body, len(choices), text, answer))
    usage = usage_of([answer.finished for answer in answers], len(plan.prompts))
    if body.max_tokens == 0:
        usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
    return JSONResponse({**head, "choices": choices, "usage": usage})


def ids_of(serving: Serving, prompt: Prompt, add_special_tokens: bool = True) -> list[list[int]]:
    """The prompts of a request as token ids.

    Raises:
        RequestError: a prompt is empty, or an id is not in the vocabulary.
    """
    if isinstance(prompt, str):
        prompts: list[Any] = [prompt]
    else:
        prompts = list(prompt) if not isinstance(prompt[0], int) else [prompt]
    size = len(serving.tokenizer)
    found = []
    for one in prompts:
        ids = one
        if isinstance(one, str):
            ids = serving.tokenizer(one, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        if not ids:
            raise bad_request("a prompt is empty: nothing could be predicted from it", "prompt")
        if max(ids) >= size:
            raise bad_request(f"the token id {max(ids)} is not in the vocabulary of {size}", "prompt")
        found.append(list(ids))
    return found


def _plan(serving: Serving, body: CompletionRequest) -> Plan:
    prompts = ids_of(serving, body.prompt, body.add_special_tokens)
    count = max(body.n or 1, body.best_of or 1)
    if len(prompts) * count > 2048:
        raise bad_request("at most 2048 answers in one request", "n")
    # at least one token is generated; of max_tokens 0 it is not shown
    max_tokens = max(body.max_tokens, 1) if body.max_tokens is not None else None
    limit = serving.generator.model_max_length
    for ids in prompts:
        checked_length(len(ids), body.max_tokens, limit, "prompt")
    ranked = count > (body.n or 1)
    sampling = sampling_of(
        body, serving.defaults, max_tokens=max_tokens, logprobs=0 if ranked and body.logprobs is None else body.logprobs
    )
    if body.echo and body.logprobs is not None:
        sampling = replace(sampling, prompt_logprobs=body.logprobs)
    texts = [_shown(serving, body.prompt, ids, place) for place, ids in enumerate(prompts)] if body.echo else []
    return Plan(body, prompts, texts or [""] * len(prompts), choices_of(sampling, count))


def _shown(serving: Serving, prompt: Prompt, ids: list[int], place: int) -> str:
    """A prompt's text, as it was given where it was given as text."""
    if isinstance(prompt, str):
        return prompt
    given = prompt[place]
    return given if isinstance(given, str) else serving.tokenizer.decode(ids)


def _best(answers: list[Answer], count: int) -> list[Answer]:
    """The answers that the model finds the most probable, by the mean of their tokens' log-probabilities."""
    if len(answers) == count:
        return answers

    def mean(answer: Answer) -> float:
        return sum(token.logprob or 0.0 for token in answer.tokens) / max(len(answer.tokens), 1)

    return sorted(answers, key=mean, reverse=True)[:count]


def _choice(body: CompletionRequest, index: int, prompt: str, answer: Answer) -> dict[str, Any]:
    tokens = answer.tokens if body.max_tokens != 0 else []
    echoed = list(answer.prompt.tokens) if answer.prompt else []
    text = prompt + "".join(token.text for token in tokens)
    logprobs = completion_logprobs([*echoed, *tokens], 0) if body.logprobs is not None else None
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": answer.finished.reason if body.max_tokens != 0 else "length",
        "stop_reason": answer.finished.stop if body.max_tokens != 0 else None,
    }


async def _chunks(plan: Plan, events: Events, head: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    body, each = plan.body, len(plan.samplings)
    count = each * len(plan.prompts)
    counted = body.stream_options is not None and bool(body.stream_options.include_usage)
    untold: list[list[Token]] = [[] for _ in range(count)]
    offsets = [0] * count
    finished: list[Finished | None] = [None] * count

    def chunk(index: int, text: str, ended: Finished | None = None) -> dict[str, Any]:
        logprobs = None
        if body.logprobs is not None and untold[index]:
            logprobs = completion_logprobs(untold[index], offsets[index])
            offsets[index] = logprobs["text_offset"][-1] + len(logprobs["tokens"][-1])
            untold[index] = []
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}
        if ended:
            choice |= {"finish_reason": ended.reason, "stop_reason": ended.stop}
        made = {**head, "choices": [choice]}
        return {**made, "usage": None} if counted else made

    echoing = body.echo and body.logprobs is None
    if echoing:
        for index in range(count):
            yield chunk(index, plan.texts[index // each])
    async for index, event in events:
        if isinstance(event, PromptTokens):
            untold[index].extend(event.tokens)
            yield chunk(index, plan.texts[index // each])
        elif isinstance(event, Token):
            untold[index].append(event)
            if event.text:
                yield chunk(index, event.text)
        else:
            finished[index] = event
            yield chunk(index, "", event)
    if counted:
        usage = usage_of([one for one in finished if one], len(plan.prompts))
        yield {**head, "choices": [], "usage": usage}
