"""Small files that are whole at every moment, and the clock that they are stamped with."""

from __future__ import annotations

import itertools
import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

_serial = itertools.count()


def write_atomically(path: Path, text: str) -> None:
    """As `write_whole`, of text."""
    write_whole(path, text.encode("utf-8"))


def write_whole(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: a reader, or a crash, finds the old file or the new one, never a part.

    Raises:
        OSError: if it cannot be written; the old file stays and nothing is left beside it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{next(_serial)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; None where there is no such file or it does not hold one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def now() -> str:
    """The time as ISO 8601 with the offset from UTC, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def seconds_since(stamp: str) -> float:
    """Seconds from a stamp of `now` until now.

    Raises:
        ValueError: if it is no such stamp.
    """
    return (datetime.now().astimezone() - datetime.fromisoformat(stamp)).total_seconds()
