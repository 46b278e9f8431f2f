"""DeepSeek V3.1: ``name<｜tool▁sep｜>{…}`` for each call."""

from __future__ import annotations

import re

from swift_dist.serving.tool_parsers.base import BetweenMarkers, Call, CallFormat, Schemas, ToolParser
from swift_dist.serving.tool_parsers.deepseek_v3 import BEGIN, END, MARKERS
from swift_dist.serving.tool_parsers.deepseek_v3 import read as read_v3

_CALL = re.compile(r"<｜tool▁call▁begin｜>([^<]*)<｜tool▁sep｜>(.*?)(?:<｜tool▁call▁end｜>|\Z)", re.DOTALL)

_FORMAT = CallFormat(BEGIN, MARKERS[0], MARKERS[1], MARKERS[2], END, separator="")


def read(text: str, schemas: Schemas) -> list[Call] | None:
    return read_v3(text, schemas, _CALL)


def PARSER(schemas: Schemas) -> ToolParser:
    return BetweenMarkers(BEGIN, END, read, schemas, markers=MARKERS, formats=(_FORMAT,))
