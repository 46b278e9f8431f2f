"""ToolBench (Qin et al. 2023, https://arxiv.org/abs/2307.16789): turns from system, user, assistant and function.

What the assistant says stays the text that it is (Thought, Action, Action Input); ``template.loss_scale`` weighs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swift_dist.data.rows._fields import first, is_plain, required
from swift_dist.data.rows._messages import check_turns, read_tools, with_system
from swift_dist.data.rows.base import Row, RowFormat
from swift_dist.data.rows.messages import TURN_COLUMNS, turns_with
from swift_dist.data.rows.sharegpt import is_toolbench, read_turns

_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "function": "tool"}


def _detect(row: Mapping[str, Any]) -> bool:
    return is_plain(row) and turns_with(row, "from") and is_toolbench(row)


def _read(row: Mapping[str, Any]) -> Row:
    column = first(row, TURN_COLUMNS) or "conversations"
    messages = with_system(read_turns(required(row, column), column, _ROLES), row)
    check_turns(messages, alternate=True)
    return Row(tuple(messages), tools=read_tools(row))


FORMAT = RowFormat(
    name="toolbench",
    summary="conversations: [{from, value}] of system, user, assistant and function (ToolBench)",
    example={
        "conversations": [
            {"from": "system", "value": "You may use: weather(city)."},
            {"from": "user", "value": "Is it raining in Paris?"},
            {"from": "assistant", "value": 'Thought: look\nAction: weather\nAction Input: {"city": "Paris"}'},
            {"from": "function", "value": '{"rain": false}'},
            {"from": "assistant", "value": "No."},
        ]
    },
    detect=_detect,
    read=_read,
    rank=45,
)
