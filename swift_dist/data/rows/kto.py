"""Answers that are judged on their own (KTO, Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from swift_dist.data.readers import kind_of
from swift_dist.data.rows._answered import answered_format, last_answer, read_answered
from swift_dist.data.rows._fields import LABEL_COLUMNS, PAIR_COLUMNS, as_number, first, has, required, without
from swift_dist.data.rows.base import BadRowError, Row, RowFormat
from swift_dist.data.rows.messages import ends_with_user

_TRUTHS = {"true", "false"}


def _detect(row: Mapping[str, Any]) -> bool:
    column = first(row, LABEL_COLUMNS)
    answered = answered_format(without(row, *LABEL_COLUMNS))
    if column is None or answered is None or first(row, PAIR_COLUMNS) or ends_with_user(row):
        return False
    # A conversation labelled 0 or 1 may also be classified as a whole: such rows are named by data.format.
    label = row[column]
    is_truth = isinstance(label, bool) or (isinstance(label, str) and label.strip().lower() in _TRUTHS)
    return column == "kto_tag" or is_truth or (label in (0, 1, "0", "1") and has(row, "prompt", "completion"))


def _read(row: Mapping[str, Any]) -> Row:
    column = first(row, LABEL_COLUMNS) or "label"
    label = as_number(required(row, column), column, "; give true or false")
    if not isinstance(label, (bool, int, float)):
        raise BadRowError(f"{column} holds {kind_of(label)}, not true or false (1 or 0)")
    if label not in (0, 1):
        raise BadRowError(f"{column} is {label}, not true or false (1 or 0)")
    answered = read_answered(without(row, *LABEL_COLUMNS))
    return replace(answered, label=bool(label), num_answer=last_answer(answered.messages))


FORMAT = RowFormat(
    name="kto",
    summary="any format of one answer with label (or kto_tag): true where the answer is wanted (TRL, ms-swift)",
    example={"prompt": "What is the capital of France?", "completion": "Paris.", "label": True},
    detect=_detect,
    read=_read,
    rank=20,
)
