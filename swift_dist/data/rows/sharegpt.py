"""ShareGPT: conversations of turns with ``from`` and ``value``; roles as LLaMA-Factory and Vicuna write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swift_dist.data.readers import kind_of
from swift_dist.data.rows._fields import as_list, first, is_plain, required
from swift_dist.data.rows._messages import THOUGHTS, check_turns, read_messages, read_tools, with_system
from swift_dist.data.rows.base import BadRowError, Message, Row, RowFormat
from swift_dist.data.rows.messages import TURN_COLUMNS, turns, turns_with

_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "tool_call",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}


def read_turns(value: Any, column: str, roles: Mapping[str, str] = _ROLES) -> list[Message]:
    """Turns of {from, value} as messages.

    Raises:
        BadRowError: they are none, or speak of roles that are not in `roles`.
    """
    items = []
    for number, turn in enumerate(as_list(value, column), 1):
        where = f"{column}, turn {number}"
        if not isinstance(turn, Mapping):
            raise BadRowError(f"{where} is {kind_of(turn)}, not an object")
        for key in ("from", "value"):
            if turn.get(key) is None:
                raise BadRowError(f"{where} has no {key}, only {', '.join(k for k in turn if turn[k] is not None)}")
        if turn["from"] not in list(roles):
            hint = "; data.format: toolbench knows it" if turn["from"] == "function" else ""
            raise BadRowError(f"{where} is from {turn['from']!r}; there are {', '.join(roles)}{hint}")
        kept = {key: turn[key] for key in ("loss", "weight", *THOUGHTS) if key in turn}
        items.append({"role": roles[turn["from"]], "content": turn["value"], **kept})
    return read_messages(items, column)


def is_toolbench(row: Mapping[str, Any]) -> bool:
    """Whether a turn is from ``function``, a name that only ToolBench has."""
    return any(isinstance(turn, Mapping) and turn.get("from") == "function" for turn in turns(row))


def _detect(row: Mapping[str, Any]) -> bool:
    return is_plain(row) and turns_with(row, "from") and not is_toolbench(row)


def _read(row: Mapping[str, Any]) -> Row:
    column = first(row, TURN_COLUMNS) or "conversations"
    messages = with_system(read_turns(required(row, column), column), row)
    check_turns(messages, alternate=True)
    return Row(tuple(messages), tools=read_tools(row))


FORMAT = RowFormat(
    name="sharegpt",
    summary="conversations: [{from, value}] of human, gpt, system, function_call and observation, with tools "
    "(ShareGPT, Vicuna, LLaMA-Factory)",
    example={
        "conversations": [
            {"from": "human", "value": "What is the capital of France?"},
            {"from": "gpt", "value": "Paris."},
        ]
    },
    detect=_detect,
    read=_read,
    rank=50,
)
