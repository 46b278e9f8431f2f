"""Kimi K2: ``functions.name:0`` and the arguments between signs. The first is the call's id, which its result names."""

from __future__ import annotations

import json
import re

from swift_dist.serving.tool_parsers.base import WORD, BetweenMarkers, Call, CallFormat, Schemas, ToolParser, call_of

_BEGIN, _END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_SIGNS = ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")
_CALL = re.compile(
    r"\s*<\|tool_call_begin\|>\s*([^<]+?:\w+)\s*<\|tool_call_argument_begin\|>(.*?)(?:<\|tool_call_end\|>|\Z)\s*",
    re.DOTALL,
)
_FORMAT = CallFormat(_BEGIN, f"{_SIGNS[0]}functions.", f":{WORD}{_SIGNS[1]}", _SIGNS[2], _END, separator="")


def read(text: str, schemas: Schemas) -> list[Call] | None:
    if _CALL.sub("", text):
        return None
    calls = []
    for number, written in _CALL.findall(text):
        try:
            arguments = json.loads(written.strip() or "{}")
        except ValueError:
            return None
        call = call_of({"name": number.partition(":")[0].removeprefix("functions."), "arguments": arguments})
        if call is None:
            return None
        calls.append(Call(call.name, call.arguments, number))
    return calls or None


def PARSER(schemas: Schemas) -> ToolParser:
    return BetweenMarkers(_BEGIN, _END, read, schemas, markers=_SIGNS, formats=(_FORMAT,))
