"""How the suite is shared out over processes (`pytest -n`, see the Makefile)."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
LONG = ("system", "engines", "cluster", "checkpoint")
"""Folders that take longest: they begin, so that no process is left with one of them at the end."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """All tests of a folder go to one process: they share warm gangs, and runs that others are compared with."""
    if not config.pluginmanager.hasplugin("dsession") and not hasattr(config, "workerinput"):
        return

    def folder(item: pytest.Item) -> str:
        return item.path.relative_to(TESTS).parts[0]

    for item in items:
        item.add_marker(pytest.mark.xdist_group(folder(item)))
    items.sort(key=lambda item: LONG.index(folder(item)) if folder(item) in LONG else len(LONG))
