"""Pairs of answers to one prompt, the first of which is preferred (DPO and its kin, reward models).

As TRL writes them: ``chosen`` and ``rejected``, each an answer or the whole conversation, with ``prompt`` where they
are answers only. As ms-swift does: a row of any format with one answer, and ``rejected_response`` or
``rejected_messages``.
Transcripts of Anthropic's hh-rlhf ("\\n\\nHuman: ...\\n\\nAssistant: ...") are taken apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from swift_dist.data.rows._answered import read_answered
from swift_dist.data.rows._fields import PAIR_COLUMNS, QUERY_COLUMNS, as_text, first, has, without
from swift_dist.data.rows._messages import check_turns, read_messages, read_tools, with_system
from swift_dist.data.rows.alpaca import instruction_text
from swift_dist.data.rows.base import BadRowError, Message, Row, RowFormat
from swift_dist.data.rows.messages import TURN_COLUMNS
from swift_dist.data.rows.query_response import query_messages
from swift_dist.data.rows.sharegpt import read_turns

_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")


def _detect(row: Mapping[str, Any]) -> bool:
    return has(row, "chosen", "rejected") or bool(first(row, ("rejected_response", "rejected_messages")))


def _read(row: Mapping[str, Any]) -> Row:
    if has(row, "chosen", "rejected"):
        chosen, rejected = _answer(row["chosen"], "chosen"), _answer(row["rejected"], "rejected")
        if (chosen[0]["role"] == "assistant") != (rejected[0]["role"] == "assistant"):
            raise BadRowError("one of chosen and rejected is an answer, the other a conversation")
        if chosen[0]["role"] == "assistant":
            return _pair(_prompt(row), chosen, rejected, read_tools(row))
        parts = _split(with_system(chosen, row), with_system(rejected, row))
        _require_prompt(row, parts[0])
        return _pair(*parts, read_tools(row))
    if has(row, "chosen") or not first(row, PAIR_COLUMNS[2:]):
        raise BadRowError("a pair is chosen and rejected, or one answer and rejected_response or rejected_messages")
    answered = read_answered(without(row, *PAIR_COLUMNS, "label"))
    if has(row, "rejected_response"):
        rejected = _answer(row["rejected_response"], "rejected_response")
        return _pair(answered.messages[:-1], answered.messages[-1:], rejected, answered.tools)
    other = with_system(_answer(row["rejected_messages"], "rejected_messages"), row)
    return _pair(*_split(answered.messages, other), answered.tools)


def _answer(value: Any, column: str) -> list[Message]:
    """An answer alone, or a whole conversation, as messages."""
    if isinstance(value, str):
        if _TRANSCRIPT.match(value):
            return _transcript(value, column)
        return [{"role": "assistant", "content": as_text(value, column)}]
    turns = [value] if isinstance(value, Mapping) else value
    if isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and turns[0].get("from") is not None:
        return read_turns(turns, column)
    return read_messages(turns, column)


def _transcript(text: str, column: str) -> list[Message]:
    roles = {"Human": "user", "Assistant": "assistant"}
    pieces = _TRANSCRIPT.split(text)[1:]
    return [
        {"role": roles[who], "content": as_text(said.strip(), f"{column}: a turn of the {roles[who]}")}
        for who, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _prompt(row: Mapping[str, Any]) -> list[Message]:
    """What stands before answers that are no whole conversations."""
    turns = first(row, TURN_COLUMNS)
    if turns:
        return with_system(_answer(row[turns], turns), row)
    if has(row, "instruction"):
        return with_system([{"role": "user", "content": instruction_text(row)}], row)
    column = first(row, QUERY_COLUMNS)
    if column is None:
        raise BadRowError("chosen and rejected are answers without a prompt")
    if isinstance(row[column], str) and _TRANSCRIPT.match(row[column]):
        text = row[column].rstrip().removesuffix("\n\nAssistant:")
        return with_system(_transcript(text, column), row)
    return query_messages(row)


def _split(
    chosen: Sequence[Message], rejected: Sequence[Message]
) -> tuple[Sequence[Message], Sequence[Message], Sequence[Message]]:
    """The messages at the beginning that two conversations share, and what follows in each."""
    same = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        same += 1
    return chosen[:same], chosen[same:], rejected[same:]


def _require_prompt(row: Mapping[str, Any], shared: Sequence[Message]) -> None:
    """A prompt beside whole conversations says again what they begin with; else one of the two is wrong."""
    column = first(row, ("prompt", "query", "question"))
    if column is None or not shared:
        return
    said = {message["content"].strip() for message in shared}
    value = row[column]
    asked = read_messages(value, column) if isinstance(value, list) else [{"content": as_text(value, column)}]
    if any(message["content"].strip() not in said for message in asked):
        raise BadRowError(f"{column} is not among the messages with which both chosen and rejected begin")


def _pair(
    prompt: Sequence[Message],
    chosen: Sequence[Message],
    rejected: Sequence[Message],
    tools: tuple[dict[str, Any], ...],
) -> Row:
    if list(chosen) == list(rejected):
        raise BadRowError("chosen and rejected are the same")
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        raise BadRowError("chosen and rejected do not answer the same prompt")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer:
            raise BadRowError(f"{name} is only the beginning of the other one: it has no answer")
        check_turns([*prompt, *answer])
    return Row((*prompt, *chosen), rejected=tuple(rejected), num_answer=len(chosen), tools=tools)


FORMAT = RowFormat(
    name="preference",
    summary="chosen and rejected (answers with a prompt, or conversations); or any format of one answer with "
    "rejected_response or rejected_messages (TRL, ms-swift, hh-rlhf)",
    example={"prompt": "What is the capital of France?", "chosen": "Paris.", "rejected": "London."},
    detect=_detect,
    read=_read,
    rank=10,
)
