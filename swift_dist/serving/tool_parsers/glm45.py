"""GLM 4.5 to 4.7: ``<tool_call>name`` and pairs of <arg_key> and <arg_value>."""

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

_PAIR = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)

_FORMAT = CallFormat(
    "<tool_call>",
    "",
    "\n",
    "</tool_call>",
    tagged=Tagged("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>", "\n"),
)


def read(text: str, schemas: Schemas) -> list[Call] | None:
    name, sign, rest = text.partition("<arg_key>")
    name, rest = name.strip(), sign + rest
    if not re.fullmatch(r"[^\s<]+", name) or _PAIR.sub("", rest).strip():
        return None
    return [tagged_call(name, ((key.strip(), value) for key, value in _PAIR.findall(rest)), schemas)]


def PARSER(schemas: Schemas) -> ToolParser:
    return BetweenMarkers("<tool_call>", "</tool_call>", read, schemas, formats=(_FORMAT,))
