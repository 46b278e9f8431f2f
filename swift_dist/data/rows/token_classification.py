"""Words with a class each, as CoNLL's named entities.

``Row.text`` is the words with one space between them and ``Row.label`` a list with a class for each: the k-th of
``row.text.split(" ")`` is of class ``row.label[k]``. A word that has a space in it is refused, so nothing shifts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swift_dist.data.rows._fields import (
    QUERY_COLUMNS,
    as_class,
    as_list,
    as_number,
    as_text,
    first,
    refuse_media,
    required,
)
from swift_dist.data.rows.base import BadRowError, Row, RowFormat
from swift_dist.data.rows.messages import TURN_COLUMNS

_WORDS = ("tokens", "words")
_CLASSES = ("labels", "ner_tags", "tags")
IGNORED = -100
"""The class of a word that is not counted, as torch's cross entropy has it."""


def _detect(row: Mapping[str, Any]) -> bool:
    columns = first(row, _WORDS), first(row, _CLASSES)
    values = [row[column] for column in columns if column]
    lists = [isinstance(value, list) or (isinstance(value, str) and value.startswith("[")) for value in values]
    # Other rows may count their tokens or carry tags.
    return len(lists) == 2 and all(lists) and not first(row, (*TURN_COLUMNS, *QUERY_COLUMNS, "instruction"))


def _read(row: Mapping[str, Any]) -> Row:
    refuse_media(row)
    words_column, classes_column = first(row, _WORDS) or "tokens", first(row, _CLASSES) or "labels"
    words = as_list(required(row, words_column), words_column)
    classes = as_list(required(row, classes_column), classes_column)
    if not words:
        raise BadRowError(f"{words_column} is empty")
    if len(words) != len(classes):
        raise BadRowError(f"{len(words)} {words_column}, but {len(classes)} {classes_column}")
    for number, word in enumerate(words, 1):
        if any(char.isspace() for char in as_text(word, f"{words_column}, word {number}")):
            raise BadRowError(f"{words_column}, word {number} has a space in it: {word!r}")
    label = [_class(value, f"{classes_column}, word {number}") for number, value in enumerate(classes, 1)]
    return Row(text=" ".join(words), label=label)


def _class(value: Any, what: str) -> int:
    return IGNORED if as_number(value, what) == IGNORED else as_class(value, what)


FORMAT = RowFormat(
    name="token_classification",
    summary="tokens (or words) with as many labels (or ner_tags, tags): a class for each, -100 for none",
    example={"tokens": ["Paris", "is", "far"], "ner_tags": [5, 0, 0]},
    detect=_detect,
    read=_read,
    rank=25,
)
