"""DeepSeek V3 and R1 (0528): ``function<｜tool▁sep｜>name`` and a JSON block for each call."""

from __future__ import annotations

import json
import re

from swift_dist.serving.tool_parsers.base import BetweenMarkers, Call, CallFormat, Schemas, ToolParser, call_of

_CALL = re.compile(
    r"<｜tool▁call▁begin｜>[^<]*<｜tool▁sep｜>([^\n]*)\n```json\n(.*?)\n```\s*(?:<｜tool▁call▁end｜>|\Z)", re.DOTALL
)
MARKERS = ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")
BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_FORMAT = CallFormat(
    BEGIN, f"{MARKERS[0]}function{MARKERS[1]}", "\n```json\n", f"\n```{MARKERS[2]}", END, separator="\n"
)


def read(text: str, schemas: Schemas, pattern: re.Pattern[str] = _CALL) -> list[Call] | None:
    try:
        found = [(name.strip(), json.loads(arguments)) for name, arguments in pattern.findall(text)]
    except ValueError:
        return None
    calls = [call_of({"name": name, "arguments": arguments}) for name, arguments in found]
    if not calls or len(calls) != text.count(MARKERS[0]):
        return None
    return [call for call in calls if call] if all(calls) else None


def PARSER(schemas: Schemas) -> ToolParser:
    return BetweenMarkers(BEGIN, END, read, schemas, markers=MARKERS, formats=(_FORMAT,))
