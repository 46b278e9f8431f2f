"""Alpaca (Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca): instruction, input and output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swift_dist.data.rows._fields import as_text, has, is_plain, required
from swift_dist.data.rows._messages import check_turns, history_messages, read_tools, with_system
from swift_dist.data.rows.base import BadRowError, Row, RowFormat
from swift_dist.data.rows.messages import turns_with


def instruction_text(row: Mapping[str, Any]) -> str:
    """Instruction and input, a line apart, as ms-swift and LLaMA-Factory join them."""
    parts = [as_text(row[key], key, empty=True) for key in ("instruction", "input") if has(row, key)]
    text = "\n".join(part for part in parts if part.strip())
    if not text:
        raise BadRowError("instruction and input are empty")
    return text


def _detect(row: Mapping[str, Any]) -> bool:
    turns = turns_with(row, "role") or turns_with(row, "from")
    return is_plain(row) and has(row, "instruction", "output") and not turns


def _read(row: Mapping[str, Any]) -> Row:
    messages = history_messages(row)
    messages.append({"role": "user", "content": instruction_text(row)})
    messages.append({"role": "assistant", "content": as_text(required(row, "output"), "output")})
    messages = with_system(messages, row)
    check_turns(messages)
    return Row(tuple(messages), tools=read_tools(row))


FORMAT = RowFormat(
    name="alpaca",
    summary="instruction, input, output, with system and history where they are (Alpaca, LLaMA-Factory)",
    example={"instruction": "Name the capital.", "input": "France", "output": "Paris."},
    detect=_detect,
    read=_read,
    rank=60,
)
