"""Columns as formats take them apart. A column that is null (or an empty cell of a CSV file) is absent."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from swift_dist.data.readers import kind_of
from swift_dist.data.rows.base import BadRowError

PAIR_COLUMNS = ("chosen", "rejected", "rejected_response", "rejected_messages")
LABEL_COLUMNS = ("label", "kto_tag")
QUERY_COLUMNS = ("query", "prompt", "question")
RESPONSE_COLUMNS = ("response", "completion", "answer")
KNOWN_COLUMNS = frozenset(
    {
        *(*PAIR_COLUMNS, *LABEL_COLUMNS, *QUERY_COLUMNS, *RESPONSE_COLUMNS),
        *("messages", "conversations", "conversation", "system", "history", "tools"),
        *("instruction", "input", "output", "text", "tokens", "words", "labels", "ner_tags", "tags"),
    }
)
_MEDIA = ("images", "videos", "audios", "image", "video", "audio")


def has(row: Mapping[str, Any], *columns: str) -> bool:
    """Whether the row has all these columns."""
    return all(row.get(column) is not None for column in columns)


def first(row: Mapping[str, Any], columns: Sequence[str]) -> str | None:
    """The first of `columns` that the row has."""
    return next((column for column in columns if row.get(column) is not None), None)


def is_plain(row: Mapping[str, Any]) -> bool:
    """Whether nothing in the row asks for a pair of answers or for a label."""
    return first(row, (*PAIR_COLUMNS, *LABEL_COLUMNS)) is None


def without(row: Mapping[str, Any], *columns: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in columns}


def refuse_media(row: Mapping[str, Any]) -> None:
    """Pictures and sounds would be left out of what the model reads: such rows are none of ours.

    Raises:
        BadRowError: the row has some.
    """
    for column in _MEDIA:
        if row.get(column):
            raise BadRowError(f"{column} are not read: rows are text")


def required(row: Mapping[str, Any], column: str) -> Any:
    if not has(row, column):
        found = ", ".join(sorted(key for key in row if row[key] is not None)[:8])
        raise BadRowError(f"no {column}, only {found or 'empty columns'}")
    return row[column]


def as_text(value: Any, what: str, empty: bool = False) -> str:
    """Text that is not blank, unless `empty` allows that."""
    if not isinstance(value, str):
        raise BadRowError(f"{what} holds {kind_of(value)}, not text")
    if not empty and not value.strip():
        raise BadRowError(f"{what} is empty")
    return value


def as_list(value: Any, what: str) -> list[Any]:
    """A list, or one written as JSON text (as tables of text cells hold it)."""
    if isinstance(value, str):
        value = from_json(value, what)
    if not isinstance(value, list):
        raise BadRowError(f"{what} holds {kind_of(value)}, not a list")
    return value


def from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"{what} is text that is not JSON: {error}") from None


_NUMBERED = "; number the classes from 0, in the order of config.json's id2label if the model has one"


def as_number(value: Any, what: str, hint: str = _NUMBERED) -> Any:
    """A finite number, true, false or a list: as it is, or written as text (as CSV files hold it)."""
    if isinstance(value, str):
        try:
            value = json.loads(value.strip().lower())
        except ValueError:
            raise BadRowError(f"{what} is the text {value[:40]!r}, not a number{hint}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRowError(f"{what} is {value}, not a finite number")
    return value


def as_class(value: Any, what: str) -> int:
    """The number of a class."""
    value = as_number(value, what)
    if not isinstance(value, int):
        raise BadRowError(f"{what} holds {kind_of(value)}, not the number of a class (0, 1, 2, ...)")
    if value < 0:
        raise BadRowError(f"{what} is {value}: classes are numbered from 0 (a number to regress to has a point: -1.0)")
    return int(value)
