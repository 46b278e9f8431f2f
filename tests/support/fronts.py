"""Fronts before small servers, and what they do seen from outside: for tests of them."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx
from load_generator import chat_body
from upstreams import Upstream

from swift_dist.serving.front import runtime
from swift_dist.serving.front.haproxy import Front
from swift_dist.serving.front.state import FrontState, Replica, Route, Version

CHAT = "/v1/chat/completions"


def routed(*versions: Version) -> FrontState:
    """All of them of the model ``m``."""
    return FrontState((Route(("m",), versions),), ("127.0.0.1", 9))  # nobody is the control API


def version(name: str, *upstreams: Upstream, share: float = 1.0) -> Version:
    return Version(name, tuple(Replica(f"{name}-{u.name}", u.host, u.port) for u in upstreams), share)


def post(front: Front, **body: object) -> httpx.Response:
    return httpx.post(front.url + CHAT, json=chat_body("m", "x", **body), timeout=60)


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


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
