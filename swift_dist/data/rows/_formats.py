"""Formats by name, and the format of a row by its columns."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from typing import Any

from swift_dist.data.rows.base import RowFormat
from swift_dist.errors import JobError
from swift_dist.plugins import UnknownPlugin, find, names

ROOM = "swift_dist.data.rows"


@cache
def formats() -> tuple[RowFormat, ...]:
    """All formats of this folder, in the order in which they are asked whether a row is theirs."""
    # Other files of the folder hold none: sources, the catalogue.
    modules = [importlib.import_module(f"{ROOM}.{name}") for name in names(ROOM)]
    found = [module.FORMAT for module in modules if hasattr(module, "FORMAT")]
    return tuple(sorted(found, key=lambda known: (known.rank, known.name)))


@cache
def find_format(name: str) -> RowFormat:
    """The format of that name: a file of this folder, or ``package.module:ATTRIBUTE``.

    Raises:
        JobError: there is none.
    """
    try:
        return find(ROOM, name, "FORMAT")
    except UnknownPlugin as error:
        known = [known.name for known in formats()]
        near = [other for other in error.suggestions if other in known]
        reason = f"{name!r} is no format of rows" + (f"; did you mean {' or '.join(near)}?" if near else "")
        remedy = f"auto, or one of {', '.join(known)}, or your own as package.module:ATTRIBUTE"
        raise JobError("data.format", reason, remedy) from None


def detect(row: Mapping[str, Any]) -> RowFormat | None:
    """The first format that knows the row's columns; None if none does."""
    return next((known for known in formats() if known.detect(row)), None)
