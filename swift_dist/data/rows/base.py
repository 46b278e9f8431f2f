"""A row as every format is read: messages, and what beside them an objective needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""One turn, as chat templates take it: ``role`` (system, user, assistant or tool) and ``content`` (text), and where the
row has them ``tool_calls`` (OpenAI's), ``tool_call_id``, ``name``, ``reasoning_content``. ``loss`` is ours: the weight
of this message's tokens in the loss (true: 1, false: 0), which the template removes before it renders."""


class BadRowError(ValueError):
    """A row that cannot be used; ``str()`` says why, in words for whoever wrote the file."""


@dataclass(frozen=True)
class Row:
    """One example.

    Args:
        messages: the conversation. Of a preference pair: prompt and chosen answer.
        rejected: of a preference pair, the messages that stand in place of the last ones of `messages`: both have the
            same prompt, ``messages[: len(messages) - num_answer]``.
        num_answer: how many of `messages` are the chosen answer of a pair, or the answer that `label` judges; 0 for
            other rows.
        tools: JSON Schemas of the functions that the assistant may call, as OpenAI's ``tools``.
        label: KTO: whether the answer is wanted; classification: class number, list of class numbers (one a token or
            multi-label) or a number to regress to. None for other rows.
        text: plain text to continue instead of a conversation.
    """

    messages: tuple[Message, ...] = ()
    rejected: tuple[Message, ...] = ()
    num_answer: int = 0
    tools: tuple[dict[str, Any], ...] = ()
    label: Any = None
    text: str | None = None


@dataclass(frozen=True)
class RowFormat:
    """A format of rows: one file of this folder holds one as ``FORMAT``.

    Args:
        name: the file's name.
        summary: one line for people: which columns, who writes it.
        example: a row of this format.
        detect: whether a row (its columns renamed already) is of this format; asked in the order of `rank`.
        read: the row; raises BadRowError.
        rank: lower is asked first (what needs more columns goes before what needs fewer).
    """

    name: str
    summary: str
    example: Mapping[str, Any]
    detect: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any]], Row]
    rank: int = 50
