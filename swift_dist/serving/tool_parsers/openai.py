"""gpt-oss (harmony): a message to ``functions.NAME`` whose text is the arguments in JSON.

Read from what `reasoning.HarmonySplitter` makes of the answer, which tells calls from what is thought and said.
"""

from __future__ import annotations

import json
import re

from swift_dist.serving.reasoning import HARMONY_CALL, HARMONY_END_OF_CALL, HARMONY_MESSAGE
from swift_dist.serving.tool_parsers.base import BetweenMarkers, Call, CallFormat, Schemas, ToolParser, call_of

_FORMAT = CallFormat(HARMONY_CALL, "functions.", HARMONY_MESSAGE, HARMONY_END_OF_CALL)
_RECIPIENT = re.compile(r"[^\s<]+")


def read(text: str, schemas: Schemas) -> list[Call] | None:
    header, sign, written = text.partition(HARMONY_MESSAGE)
    recipient = _RECIPIENT.match(header)
    if not sign or recipient is None:
        return None
    name = recipient[0].removeprefix("functions.")
    if name == recipient[0] and name not in schemas:  # a tool of the model's own, such as python
        return None
    try:
        arguments = json.loads(written.strip() or "{}")
    except ValueError:
        return None
    call = call_of({"name": name, "arguments": arguments})
    return [call] if call else None


class HarmonyCalls(BetweenMarkers):
    """The answer ends with a call: its result would follow."""

    stop = (HARMONY_END_OF_CALL,)


def PARSER(schemas: Schemas) -> ToolParser:
    return HarmonyCalls(
        HARMONY_CALL, HARMONY_END_OF_CALL, read, schemas, markers=(HARMONY_MESSAGE,), formats=(_FORMAT,)
    )
