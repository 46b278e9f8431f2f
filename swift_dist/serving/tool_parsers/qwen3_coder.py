"""Qwen3-Coder and Qwen 3.5: a call in tags, ``<function=name><parameter=key>value</parameter></function>``."""

from __future__ import annotations

import re

from swift_dist.serving.tool_parsers.base import (
    BetweenMarkers,
    Call,
    CallFormat,
    Schemas,
    Tagged,
    ToolParser,
    tagged_call,
)

_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)(?:</function>\s*|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)

FORMAT = CallFormat(
    "<tool_call>",
    "\n<function=",
    ">\n",
    "</function>\n</tool_call>",
    tagged=Tagged("<parameter=", ">\n", "\n</parameter>", "\n"),
)


def read(text: str, schemas: Schemas) -> list[Call] | None:
    found = _FUNCTION.fullmatch(text)
    if found is None:
        return None
    return [tagged_call(found[1], _PARAMETER.findall(found[2]), schemas)]


def PARSER(schemas: Schemas) -> ToolParser:
    return BetweenMarkers("<tool_call>", "</tool_call>", read, schemas, formats=(FORMAT,))
