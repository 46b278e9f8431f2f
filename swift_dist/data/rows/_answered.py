"""Rows with one answer, of whichever format: what pairs and judged answers are written upon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from swift_dist.data.rows import alpaca, messages, query_response, sharegpt, toolbench
from swift_dist.data.rows.base import BadRowError, Message, Row, RowFormat

ANSWERED = (messages.FORMAT, toolbench.FORMAT, sharegpt.FORMAT, alpaca.FORMAT, query_response.FORMAT)


def answered_format(row: Mapping[str, Any]) -> RowFormat | None:
    """The format of a row without columns of pairs and labels; None if it is of none of those with one answer."""
    return next((known for known in ANSWERED if known.detect(row)), None)


def read_answered(row: Mapping[str, Any]) -> Row:
    """The row by its format.

    Raises:
        BadRowError: it is of none, or malformed.
    """
    known = answered_format(row)
    if known is None:
        raise BadRowError(f"there is no conversation in it: give the columns of {', '.join(f.name for f in ANSWERED)}")
    return known.read(row)


def last_answer(messages: Sequence[Message]) -> int:
    """How many messages stand after the last one of the user."""
    return next(n for n, message in enumerate(reversed(messages)) if message["role"] == "user")
