"""MiniMax M2: calls in tags, ``<invoke name="f"><parameter name="key">value</parameter></invoke>``."""

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

_INVOKE = re.compile(r"\s*<invoke name=[\"']?([^\"'>\n]+)[\"']?>(.*?)(?:</invoke>|\Z)\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter name=[\"']?([^\"'>\n]+)[\"']?>(.*?)</parameter>\s*", re.DOTALL)
_BEGIN, _END = "<minimax:tool_call>", "</minimax:tool_call>"
_FORMAT = CallFormat(
    _BEGIN,
    '<invoke name="',
    '">\n',
    "</invoke>\n",
    _END,
    open="\n",
    separator="",
    tagged=Tagged('<parameter name="', '">', "</parameter>", "\n"),
)


def read(text: str, schemas: Schemas) -> list[Call] | None:
    calls = []
    for name, body in _INVOKE.findall(text):
        if _PARAMETER.sub("", body).strip():
            return None
        calls.append(tagged_call(name, _PARAMETER.findall(body), schemas))
    return calls if calls and not _INVOKE.sub("", text) else None


def PARSER(schemas: Schemas) -> ToolParser:
    return BetweenMarkers(_BEGIN, _END, read, schemas, formats=(_FORMAT,))
