"""Mistral: ``[TOOL_CALLS]`` and a JSON list, or since its tokenizer v11 ``[TOOL_CALLS]name[ARGS]{…}`` for each call."""

from __future__ import annotations

import json

from swift_dist.serving.tool_parsers.base import (
    WORD,
    BetweenMarkers,
    Call,
    CallFormat,
    Schemas,
    ToolParser,
    call_of,
    read_json,
)

_BEGIN, _ID, _ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_LIST = CallFormat(_BEGIN, '{"name": "', '", "arguments": ', "}", open="[", separator=", ", end="]")
_SIGNS = tuple(CallFormat(_BEGIN, "", id + _ARGUMENTS, "") for id in ("", _ID + WORD))


def read(text: str, schemas: Schemas) -> list[Call] | None:
    if text.lstrip().startswith(("[{", "{", "[ {", "[\n")):
        return read_json(text, schemas)
    calls = []
    for one in text.split(_BEGIN):
        head, sign, body = one.partition(_ARGUMENTS)
        if not sign:  # v11 without the sign: name{…}
            brace = one.find("{")
            head, body = (one[:brace], one[brace:]) if brace > 0 else (one, "")
        try:
            call = call_of({"name": head.partition(_ID)[0].strip(), "arguments": json.loads(body)})
        except ValueError:
            return None
        if call is None:
            return None
        calls.append(call)
    return calls


def PARSER(schemas: Schemas) -> ToolParser:
    return BetweenMarkers(_BEGIN, "", read, schemas, markers=(_ID, _ARGUMENTS), formats=(_LIST, *_SIGNS))
