"""Phi-4-mini: ``functools`` and a JSON list of calls to the end of the answer."""

from __future__ import annotations

from swift_dist.serving.tool_parsers.base import BetweenMarkers, Call, CallFormat, Schemas, ToolParser, read_json

_BEGIN = "functools["
_FORMAT = CallFormat(_BEGIN, '{"name": "', '", "arguments": ', "}", separator=", ", end="]")


def read(text: str, schemas: Schemas) -> list[Call] | None:
    return read_json("[" + text, schemas)


def PARSER(schemas: Schemas) -> ToolParser:
    return BetweenMarkers(_BEGIN, "", read, schemas, formats=(_FORMAT,))
