"""Seed-OSS: as Qwen3-Coder between tags of its own."""

from __future__ import annotations

from dataclasses import replace

from swift_dist.serving.tool_parsers.base import BetweenMarkers, Schemas, ToolParser
from swift_dist.serving.tool_parsers.qwen3_coder import FORMAT, read

_BEGIN, _END = "<seed:tool_call>", "</seed:tool_call>"
_FORMAT = replace(FORMAT, begin=_BEGIN, after=f"</function>\n{_END}")


def PARSER(schemas: Schemas) -> ToolParser:
    return BetweenMarkers(_BEGIN, _END, read, schemas, formats=(_FORMAT,))
