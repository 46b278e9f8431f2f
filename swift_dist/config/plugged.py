"""Sections made of plug-ins: the options of every file of a room, each declared in its own file."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from pydantic import Field, create_model

from swift_dist.config.section import Section
from swift_dist.plugins import names


def plugged(
    room: str,
    base: type[Section] = Section,
    name: str | None = None,
    keep: Callable[[ModuleType], bool] = lambda module: True,
) -> Any:
    """`base` with a field ``<name>`` for every file of `room` that has ``Options``, a Section with defaults.

    `keep` says which files are meant. Their fields are found when this runs, so type checkers do not know them.
    """
    fields: dict[str, Any] = {}
    for plugin in names(room):
        module = importlib.import_module(f"{room}.{plugin}")
        options = getattr(module, "Options", None)
        if options is not None and options.model_fields and keep(module):
            fields[plugin] = (options, Field(options()))
    return create_model(name or base.__name__, __base__=base, **fields)
