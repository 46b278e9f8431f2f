"""What the ways of writing tools share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from swift_dist.data.rows.base import BadRowError

Message = dict[str, Any]
Part = tuple[str, float | None]


def functions(tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each tool's ``function``, whether it is wrapped in ``{"type": "function", ...}`` or not."""
    return [tool.get("function", tool) for tool in tools]


def as_json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def with_system(messages: Sequence[Message], text_after: Callable[[str], str]) -> list[Message]:
    """The messages with ``text_after(system message, or "")`` as their system message."""
    has = bool(messages) and messages[0]["role"] == "system"
    system = messages[0]["content"] if has else ""
    return [{"role": "system", "content": text_after(system)}, *messages[int(has) :]]


def paragraphs(*texts: str) -> str:
    """The texts that are not empty, a blank line between them."""
    return "\n\n".join(text for text in texts if text)


def in_one_turn(
    messages: Sequence[Message],
    write_calls: Callable[[list[dict[str, Any]]], str],
    write_results: Callable[[list[str]], str],
    before_reply: str = "",
) -> list[Message]:
    """Put results of tools, and what the assistant says after them, into the turn that called.

    Args:
        write_calls: the calls of one message as text, up to where generation stops for the results.
        write_results: their results as text: what is given before generation goes on.
        before_reply: what generation goes on with, before the assistant's own words.

    Raises:
        BadRowError: a result that no call asked for.
    """
    written: list[Message] = []
    results: list[str] = []
    turn: list[Part] | None = None  # the assistant's turn that waits for results
    for message in [*messages, {"role": "end"}]:
        if message["role"] == "tool":
            if turn is None:
                raise BadRowError("a result of a tool follows no call of one")
            results.append(message["content"])
            continue
        if turn is not None:
            # Without results generation has stopped at the calls: the model would not end its turn there.
            turn.append((write_results(results) if results else "", 0.0))
        going_on = turn is not None and bool(results)
        turn_before, turn, results = turn, None, []
        if message["role"] == "end":
            break
        if message["role"] != "assistant":
            written.append(dict(message))
            continue
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        text, loss = message["content"].strip(), message.get("loss")
        if calls:
            text = (text + "\n" if text else "") + write_calls(calls)
        parts = turn_before if going_on and turn_before is not None else []
        parts.append((before_reply + text if going_on else text, loss))
        if not going_on:
            kept = {key: value for key, value in message.items() if key not in ("tool_calls", "loss")}
            written.append({**kept, "parts": parts})
        turn = parts if calls else None
    for message in written:
        if "parts" in message:
            message["content"] = "".join(text for text, _ in message["parts"])
    return written
