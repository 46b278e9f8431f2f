"""Granite 3: a sign, and a JSON list of calls to the end of the answer."""

from __future__ import annotations

from swift_dist.serving.tool_parsers.base import BetweenMarkers, CallFormat, Schemas, ToolParser, read_json

_BEGIN = "<|tool_call|>"
_FORMAT = CallFormat(_BEGIN, '{"name": "', '", "arguments": ', "}", open="[", separator=", ", end="]")


def PARSER(schemas: Schemas) -> ToolParser:
    return BetweenMarkers(_BEGIN, "", read_json, schemas, formats=(_FORMAT,))
