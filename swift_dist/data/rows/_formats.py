"""Formats by name, and the format of a row by its columns."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from swift_dist.data.rows.base import RowFormat
from swift_dist.errors import JobError
from swift_dist.plugins import UnknownPlugin, find, names

ROOM = "swift_dist.data.rows"
_NO_FORMATS = frozenset({"catalogue", "source"})  # files of this folder that hold none


@cache
def formats() -> tuple[RowFormat, ...]:
    """All formats of this folder, in the order in which they are asked whether a row is theirs."""
    found = [find(ROOM, name, "FORMAT") for name in names(ROOM) if name not in _NO_FORMATS]
    return tuple(sorted(found, key=lambda known: (known.rank, known.name)))


@cache
def find_format(name: str) -> RowFormat:
    """The format of that name: a file of this folder, or ``package.module:ATTRIBUTE``.

    Raises:
        JobError: there is none.
    """
    try:
        if name not in _NO_FORMATS:
            return find(ROOM, name, "FORMAT")
        reason = f"{name!r} is no format"
    except UnknownPlugin as error:
        reason = str(error).split(" There are: ")[0]
    known = ", ".join(known.name for known in formats())
    raise JobError("data.format", reason, f"auto, or one of {known}, or your own as package.module:ATTRIBUTE") from None


def detect(row: Mapping[str, Any]) -> RowFormat | None:
    """The first format that knows the row's columns; None if none does."""
    return next((known for known in formats() if known.detect(row)), None)
