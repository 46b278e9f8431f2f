"""From a request's body to what the generator is asked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swift_dist.serving.hf.failures import bad_request, too_long
from swift_dist.serving.hf.protocol import JsonSchema, NamedTool, SamplingBody, StructuredOutputs, Tool
from swift_dist.serving.hf.requests import Calls, Guide, Sampling, Thinking
from swift_dist.serving.tool_parsers.base import ToolParser


@dataclass(frozen=True)
class Defaults:
    """What holds where a request says nothing: the model's generation_config.json, as vLLM takes it from there."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None

    @classmethod
    def of(cls, folder: str) -> Defaults:
        """Those of a model's folder."""
        file = Path(folder) / "generation_config.json"
        saved = json.loads(file.read_text()) if file.is_file() else {}
        known = {name: saved[name] for name in cls.__dataclass_fields__ if saved.get(name) is not None}
        return cls(**known)


def sampling_of(
    body: SamplingBody, defaults: Defaults, *, max_tokens: int | None, stop: Sequence[str] = (), **given: Any
) -> Sampling:
    """The request's sampling.

    Args:
        max_tokens: of the answer; None where the request says nothing.
        stop: texts beside the request's own.
        given: further fields of `Sampling`.
    """
    own = [body.stop] if isinstance(body.stop, str) and body.stop else list(body.stop or ())
    chosen = {
        name: getattr(defaults, name) if getattr(body, name) is None else getattr(body, name)
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    }
    chosen["top_k"] = max(chosen["top_k"], 0)
    sampling = Sampling(
        max_tokens=max_tokens,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias={int(key): float(value) for key, value in (body.logit_bias or {}).items()},
        stop=tuple(dict.fromkeys([*own, *stop])),
        include_stop=body.include_stop_str_in_output,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=body.ignore_eos,
        min_tokens=body.min_tokens,
        seed=body.seed,
        skip_special_tokens=body.skip_special_tokens,
        guide=guide_of(body),
        **chosen,
    )
    return replace(sampling, **given)


def choices_of(sampling: Sampling, count: int) -> list[Sampling]:
    """One sampling a choice: with a seed each has another one, or all would be the same."""
    if sampling.seed is None or count == 1:
        return [sampling] * count
    top = 2**63
    return [replace(sampling, seed=(sampling.seed + k + top) % (2 * top) - top) for k in range(count)]


def checked_length(prompt: int, max_tokens: int | None, limit: int, param: str) -> None:
    """Refuse what the context has no room for; `param` is the request's field that the prompt comes from."""
    if prompt >= limit or (max_tokens is not None and prompt + max_tokens > limit):
        raise too_long(prompt, max_tokens, limit, param)


def guide_of(body: SamplingBody) -> Guide | None:
    """What the text must be, by response_format or structured_outputs."""
    asked: ResponseKind = body.structured_outputs
    if body.response_format is not None:
        if body.response_format.type == "json_object":
            return Guide("json_object")
        asked = body.response_format.json_schema or asked
    if isinstance(asked, JsonSchema):
        return Guide("json_schema", json.dumps(asked.schema_))
    if asked is None:
        return None
    if asked.json_ is not None:
        return Guide("json_schema", asked.json_ if isinstance(asked.json_, str) else json.dumps(asked.json_))
    if asked.choice is not None:
        return Guide("choice", tuple(asked.choice))
    if asked.regex is not None:
        return Guide("regex", asked.regex)
    return Guide("grammar", asked.grammar) if asked.grammar is not None else Guide("json_object")


ResponseKind = StructuredOutputs | JsonSchema | None


def strict_guide(tools: Sequence[Tool], parser: ToolParser | None, parallel: bool) -> Guide | None:
    """Calls that the model chooses to make, where a tool is strict: those of strict tools fit their schemas.

    Raises:
        RequestError: calls are written in a way that cannot be guided.
    """
    if not any(tool.function.strict for tool in tools):
        return None
    if parser is None or not parser.formats:
        raise bad_request(
            "strict tools are not guided in the notation of this model: leave strict out, or force the call "
            '(tool_choice "required" or a tool\'s name)',
            "tools",
        )
    schemas = [(tool.function.name, json.dumps(schema_of(tool)) if tool.function.strict else None) for tool in tools]
    return Guide("calls", Calls(parser.formats, tuple(schemas), parallel))


def thinking_before(tags: tuple[str, str] | None, prompt: str) -> Thinking | None:
    """What comes before an answer to this prompt: a guide holds for what follows, as vLLM has it."""
    if tags is None or prompt.rstrip().endswith(tags[1]):
        return None
    return Thinking(*tags, begun=prompt.rstrip().endswith(tags[0]))


def forced_guide(choice: Any, tools: Sequence[Tool], parallel: bool) -> Guide | None:
    """What the text must be where calls are forced; None where they are not.

    A named tool: the text is the arguments. ``required``: a list of ``{"name": …, "parameters": …}``.
    """
    if isinstance(choice, NamedTool):
        named = next(tool for tool in tools if tool.function.name == choice.function.name)
        return Guide("json_schema", json.dumps(schema_of(named)))
    if choice != "required":
        return None
    shared: dict[str, Any] = {}
    calls = []
    for tool in tools:
        schema = dict(schema_of(tool))
        # "#/$defs/x" is read from the whole schema's root
        for key in ("$defs", "definitions"):
            for name, definition in schema.pop(key, {}).items():
                if shared.setdefault(key, {}).setdefault(name, definition) != definition:
                    raise bad_request(f"two tools define {key}/{name} differently: rename one of them", "tools")
        properties = {"name": {"type": "string", "enum": [tool.function.name]}, "parameters": schema}
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    most = {} if parallel else {"maxItems": 1}
    return Guide(
        "json_schema", json.dumps({"type": "array", "items": {"anyOf": calls}, "minItems": 1, **most, **shared})
    )


def schema_of(tool: Tool) -> Mapping[str, Any]:
    """The schema of a tool's arguments; without one it takes none, as OpenAI has it."""
    if tool.function.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    # arguments are an object even where the schema forgets to say so
    return (
        tool.function.parameters
        if "type" in tool.function.parameters
        else {**tool.function.parameters, "type": "object"}
    )
