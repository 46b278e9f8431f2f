"""Conversations as OpenAI's chat API writes them; also those of ms-swift with their roles tool_call and tool_response.

ReAct rows are such conversations too: Thought, Action and Observation stay the text that they are, and
``template.loss_scale`` weighs them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from swift_dist.data.rows._fields import first, is_plain, required
from swift_dist.data.rows._messages import check_turns, read_messages, read_tools, with_system
from swift_dist.data.rows.base import Row, RowFormat

TURN_COLUMNS = ("messages", "conversations", "conversation")


def turns(row: Mapping[str, Any]) -> list[Any]:
    """The row's conversation, taken out of JSON text where a table holds it so; empty if there is none."""
    value = row.get(first(row, TURN_COLUMNS) or "")
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    return value if isinstance(value, list) else []


def turns_with(row: Mapping[str, Any], key: str) -> bool:
    """Whether the first turn of the row's conversation has `key`: role here, from in ShareGPT's."""
    found = turns(row)
    return bool(found) and isinstance(found[0], Mapping) and found[0].get(key) is not None


def ends_with_user(row: Mapping[str, Any]) -> bool:
    """Whether the row's conversation waits for an answer."""
    found = turns(row)
    last = found[-1] if found else None
    return isinstance(last, Mapping) and (last.get("role") or last.get("from")) in ("user", "human")


def _detect(row: Mapping[str, Any]) -> bool:
    # A column of this name that holds something else is read too: what is wrong with it is worth knowing.
    named = row.get("messages") is not None and not turns_with(row, "from")
    return is_plain(row) and (named or turns_with(row, "role"))


def _read(row: Mapping[str, Any]) -> Row:
    column = first(row, TURN_COLUMNS) or "messages"
    messages = with_system(read_messages(required(row, column), column), row)
    check_turns(messages)
    return Row(tuple(messages), tools=read_tools(row))


FORMAT = RowFormat(
    name="messages",
    summary="messages: [{role, content}], with tool_calls, tools and loss where they are (OpenAI, ms-swift, TRL)",
    example={
        "messages": [
            {"role": "system", "content": "You are brief."},
            {"role": "user", "content": "What is the capital of France?"},
            {"role": "assistant", "content": "Paris."},
        ]
    },
    detect=_detect,
    read=_read,
    rank=40,
)
