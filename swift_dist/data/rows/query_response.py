"""A question and its answer in two columns, with system and history where they are (ms-swift, TRL)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swift_dist.data.rows._fields import QUERY_COLUMNS, RESPONSE_COLUMNS, as_text, first, has, is_plain, required
from swift_dist.data.rows._messages import (
    check_turns,
    history_messages,
    read_messages,
    read_tools,
    with_system,
)
from swift_dist.data.rows.base import BadRowError, Message, Row, RowFormat
from swift_dist.data.rows.messages import turns_with


def query_messages(row: Mapping[str, Any]) -> list[Message]:
    """System, history and query: all before the answer. A query may be a list of messages (TRL's prompts)."""
    column = first(row, QUERY_COLUMNS) or "query"
    value = required(row, column)
    if isinstance(value, list):
        query = read_messages(value, column)
        if query[-1]["role"] not in ("user", "tool"):
            raise BadRowError(f"{column} ends with a message of the {query[-1]['role']}: the answer follows it")
    else:
        query = [{"role": "user", "content": as_text(value, column)}]
    history = history_messages(row)
    if history and query[0]["role"] == "system":
        raise BadRowError(f"{column} begins with a system message, which the history cannot stand before")
    return with_system([*history, *query], row)


def _detect(row: Mapping[str, Any]) -> bool:
    other = turns_with(row, "role") or turns_with(row, "from") or has(row, "instruction", "output")
    return is_plain(row) and not other and bool(first(row, QUERY_COLUMNS) and first(row, RESPONSE_COLUMNS))


def _read(row: Mapping[str, Any]) -> Row:
    messages = query_messages(row)
    column = first(row, RESPONSE_COLUMNS) or "response"
    value = required(row, column)
    if isinstance(value, list):
        messages += read_messages(value, column)
    else:
        messages.append({"role": "assistant", "content": as_text(value, column)})
    check_turns(messages)
    return Row(tuple(messages), tools=read_tools(row))


FORMAT = RowFormat(
    name="query_response",
    summary="query (or prompt, question) and response (or completion, answer), with system and history (ms-swift, TRL)",
    example={"query": "What is the capital of France?", "response": "Paris.", "history": [["Hello", "Hello!"]]},
    detect=_detect,
    read=_read,
    rank=70,
)
