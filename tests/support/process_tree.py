"""Whether processes are gone."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path


def exists(pid: int) -> bool:
    """A zombie does not: it holds nothing, and its parent may be slow to ask for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone_within(pids: Iterable[int], seconds: float) -> bool:
    pids, deadline = list(pids), time.monotonic() + seconds
    while any(exists(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
