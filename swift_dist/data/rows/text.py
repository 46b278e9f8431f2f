"""Plain text to continue: all of it is learnt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swift_dist.data.rows._answered import answered_format
from swift_dist.data.rows._fields import as_text, has, is_plain, refuse_media, required
from swift_dist.data.rows.base import Row, RowFormat


def _detect(row: Mapping[str, Any]) -> bool:
    return is_plain(row) and has(row, "text") and answered_format(row) is None


def _read(row: Mapping[str, Any]) -> Row:
    refuse_media(row)
    return Row(text=as_text(required(row, "text"), "text"))


FORMAT = RowFormat(
    name="text",
    summary="text: continued without a template, every token learns; lines of .txt files are such rows",
    example={"text": "Paris is the capital of France."},
    detect=_detect,
    read=_read,
    rank=90,
)
