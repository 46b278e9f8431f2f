"""What a front does, seen from outside: for tests of it."""

from __future__ import annotations

from swift_dist.serving.front import runtime
from swift_dist.serving.front.haproxy import Front


def pids(front: Front) -> tuple[int, ...]:
    """HAProxy's process, and its guard's; none once it has ended."""
    return (front._pid, front._guard.pid) if front.alive and front._guard and front._pid else ()


def running(front: Front, version: str) -> int:
    """Requests of a version that run or wait, also after a state without it. 0 once there are none."""
    try:
        found = runtime.use(front.folder).get(f"v{front._names.used.get(version)}")
    except OSError:  # it has ended
        return 0
    return found.running + found.waiting if found else 0
