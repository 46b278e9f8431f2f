"""Texts or conversations with a label: a class, several classes, or a number to regress to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swift_dist.data.readers import kind_of
from swift_dist.data.rows._fields import (
    PAIR_COLUMNS,
    QUERY_COLUMNS,
    RESPONSE_COLUMNS,
    as_class,
    as_number,
    as_text,
    first,
    has,
    refuse_media,
    required,
)
from swift_dist.data.rows._messages import check_turns, read_messages, with_system
from swift_dist.data.rows.base import BadRowError, Row, RowFormat
from swift_dist.data.rows.messages import TURN_COLUMNS, ends_with_user, turns_with
from swift_dist.data.rows.query_response import query_messages
from swift_dist.data.rows.sharegpt import read_turns


def _detect(row: Mapping[str, Any]) -> bool:
    if not has(row, "label") or first(row, (*PAIR_COLUMNS, "kto_tag", "instruction")):
        return False
    column = first(row, TURN_COLUMNS)
    if column is None:
        return has(row, "text") or bool(first(row, QUERY_COLUMNS) and not first(row, RESPONSE_COLUMNS))
    # A conversation that ends with an answer may be one that KTO judges: such rows are named by data.format.
    return ends_with_user(row)


def _read(row: Mapping[str, Any]) -> Row:
    refuse_media(row)
    label = _label(required(row, "label"))
    column = first(row, TURN_COLUMNS)
    if column is not None:
        read = read_turns if turns_with(row, "from") else read_messages
        messages = with_system(read(row[column], column), row)
    elif has(row, "text"):
        return Row(text=as_text(row["text"], "text"), label=label)
    elif first(row, QUERY_COLUMNS):
        messages = query_messages(row)
    else:
        raise BadRowError("there is no text, messages or query to classify")
    check_turns(messages, answered=False)
    return Row(tuple(messages), label=label)


def _label(value: Any) -> int | float | list[int]:
    value = as_number(value, "label")
    if isinstance(value, list):
        classes = [as_class(item, "an entry of label") for item in value]
        if len(set(classes)) < len(classes):
            raise BadRowError("label is the list of the text's classes, and names one of them twice")
        return classes
    if isinstance(value, float):
        return value
    if not isinstance(value, int):
        raise BadRowError(f"label holds {kind_of(value)}, not the number of a class, a list of them or a number")
    return as_class(value, "label")


FORMAT = RowFormat(
    name="classification",
    summary="text, messages or query with label: a class (2), several ([0, 2]) or a number to regress to (0.5)",
    example={"text": "I liked it.", "label": 1},
    detect=_detect,
    read=_read,
    rank=30,
)
