"""How an answer is drawn: keys of `swift-dist infer` (OpenAI's and vLLM's names) as fields of a request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from swift_dist.config.section import Section
from swift_dist.errors import JobError

_OPENAI = ("temperature", "top_p", "max_tokens", "n", "frequency_penalty", "presence_penalty")
EXTENSIONS = ("top_k", "min_p", "repetition_penalty")  # of vLLM's API, which the other engines follow


class SamplingOptions(Section):
    """What is not given is left to the engine: the model's generation_config.json, else its own defaults."""

    temperature: float | None = Field(None, ge=0, le=2, description="0: the likeliest token each time")
    top_p: float | None = Field(None, gt=0, le=1, description="draw from the likeliest tokens of so much probability")
    top_k: int | None = Field(None, ge=-1, description="draw from so many of the likeliest tokens (-1 or 0: all)")
    min_p: float | None = Field(None, ge=0, le=1, description="drop tokens below this share of the likeliest one's")
    max_tokens: int | None = Field(None, gt=0, description="of an answer (default: what the context has room for)")
    stop: tuple[str, ...] = Field((), max_length=4, description="texts that end the answer, up to four; left out of it")
    n: int = Field(1, ge=1, le=128, description="answers to each prompt")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="against tokens by how often they stood")
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="against tokens that stood before")
    repetition_penalty: float | None = Field(None, gt=0, description="divides the scores of tokens that stood before")
    logprobs: bool = Field(False, description="give the log-probability of each token of an answer")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="and of so many of the likeliest at each place")
    json_schema: str | None = Field(None, description="file of a JSON Schema that every answer must fulfil")


def request_fields(options: SamplingOptions, seed: int | None = None, *, chat: bool = True) -> dict[str, Any]:
    """The fields of a request, of /v1/chat/completions or /v1/completions.

    Args:
        seed: of the draw; None: the engine's.
        chat: which of the two.

    Raises:
        JobError: an option that contradicts another, or a schema that cannot be read.
    """
    if options.top_logprobs is not None and not options.logprobs:
        raise JobError("top_logprobs", "is read with --logprobs only", "add --logprobs")
    fields: dict[str, Any] = {name: getattr(options, name) for name in _OPENAI if getattr(options, name) is not None}
    if options.n == 1:
        del fields["n"]
    if options.stop:
        fields["stop"] = list(options.stop)
    if seed is not None:
        fields["seed"] = seed
    if options.logprobs:
        wanted = {"logprobs": True, "top_logprobs": options.top_logprobs or 0}
        fields.update(wanted if chat else {"logprobs": options.top_logprobs or 0})
    if options.json_schema:
        fields["response_format"] = _response_format(options.json_schema)
    return {**fields, **{name: getattr(options, name) for name in EXTENSIONS if getattr(options, name) is not None}}


def _response_format(file: str) -> dict[str, Any]:
    try:
        schema = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError("json_schema", f"{file} cannot be read: {error}", "give a file of JSON") from None
    if not isinstance(schema, dict):
        raise JobError("json_schema", f"{file} does not hold a JSON object", "give a file with a JSON Schema")
    name = "".join(letter if letter.isalnum() else "_" for letter in Path(file).stem)[:64] or "answer"
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}
