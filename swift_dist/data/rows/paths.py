"""Addresses of rows that another working folder understands."""

from __future__ import annotations

from pathlib import Path

from swift_dist.data.rows._address import parse_address


def is_here(given: str, key: str) -> bool:
    """Whether an address names a local file or folder, and no hub's dataset; raises JobError where it names nothing."""
    return not parse_address(given, key).hub


def absolute_address(given: str, key: str) -> str:
    """`given` with the path of a local file or folder made absolute; a hub's id stays as it is.

    Raises:
        JobError: it names nothing.
    """
    address = parse_address(given, key)
    if address.hub:
        return given
    assert given.startswith(address.path)
    return str(Path(address.path).expanduser().absolute()) + given[len(address.path) :]
