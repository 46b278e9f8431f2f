"""Hermes 2 Pro, Qwen 2.5 and 3, and whatever was tuned with ``template.agent: hermes``: JSON between tags."""

from __future__ import annotations

from swift_dist.serving.tool_parsers.base import BetweenMarkers, CallFormat, Schemas, ToolParser, read_json

FORMATS = tuple(
    CallFormat("<tool_call>", space + '{"name": "', '", "arguments": ', "}" + space + "</tool_call>")
    for space in ("\n", "")
)


def PARSER(schemas: Schemas) -> ToolParser:
    return BetweenMarkers("<tool_call>", "</tool_call>", read_json, schemas, formats=FORMATS)
