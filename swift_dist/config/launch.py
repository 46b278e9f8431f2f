"""The job's `launch` section: the options of every launcher, each declared in its own file."""

from __future__ import annotations

import importlib
from typing import Any

from pydantic import Field, create_model

from swift_dist.config.section import Section
from swift_dist.plugins import names

_ROOM = "swift_dist.launchers"


def _assemble() -> type[Section]:
    """`launch.<name>` for every file of the room that has `Options`."""
    fields: dict[str, Any] = {}
    for name in names(_ROOM):
        options = getattr(importlib.import_module(f"{_ROOM}.{name}"), "Options", None)
        if options is not None:
            fields[name] = (options, Field(options()))
    return create_model("LaunchSection", __base__=Section, **fields)


LaunchSection: Any = _assemble()
"""A Section. (Its fields are found when this is imported, so type checkers do not know them.)"""
