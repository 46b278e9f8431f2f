"""A front that is stopped, or whose owner is killed."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
from fronts import CHAT, routed, version, wait_for
from fronts import pids as pids_of
from fronts import running as in_front
from load_generator import Load, chat_body
from ports import free_port


def test_stopping_lets_requests_end(make_upstream, make_front) -> None:
    upstream = make_upstream("a")
    front = make_front(routed(version("v1", upstream)))
    bodies = [chat_body("m", "x", held_at=0), chat_body("m", "x", stream=True, held_at=2)]
    with httpx.Client() as idle, Load(front.url, bodies, concurrency=8, requests=8).in_background() as running:
        idle.post(front.url + CHAT, json=chat_body("m", "x"))
        wait_for(lambda: in_front(front, "v1") == 8)
        pids, began = pids_of(front), time.monotonic()
        threading.Timer(0.6, upstream.release).start()
        front.stop(drain=60)
        assert 0.5 < time.monotonic() - began < 50  # a connection that idles is waited for 3 seconds
    assert not running.report.failures, running.report.describe()
    assert not front.alive and not any(psutil.pid_exists(pid) for pid in pids)
    front.stop()


def test_stopping_has_an_end(make_upstream, make_front) -> None:
    front = make_front(routed(version("v1", make_upstream("a"))))
    with Load(front.url, [chat_body("m", "x", held_at=0)], concurrency=1, requests=1).in_background() as running:
        wait_for(lambda: in_front(front, "v1") == 1)
        began = time.monotonic()
        front.stop(drain=1)
        assert 0.9 < time.monotonic() - began < 20
    assert len(running.report.failures) == 1


def test_the_front_dies_with_its_owner(make_upstream, tmp_path: Path) -> None:
    upstream, port = make_upstream("a"), free_port()
    owner = subprocess.Popen(
        [sys.executable, "-c", f"""
import time
from pathlib import Path
from swift_dist.serving.front.haproxy import Front
from swift_dist.serving.front.options import FrontOptions
from swift_dist.serving.front.state import FrontState, Replica, Route, Version
route = Route(("m",), (Version("v1", (Replica("a", "127.0.0.1", {upstream.port}),)),))
front = Front(Path({str(tmp_path)!r}), FrontOptions(port={port})).start(FrontState((route,), ("127.0.0.1", 9)))
print(front._pid, front._guard.pid, flush=True)
time.sleep(60)
"""],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with owner:
        assert owner.stdout
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 2 and httpx.post(f"http://127.0.0.1:{port}{CHAT}", json=chat_body("m", "x")).is_success
        owner.kill()
        owner.wait()
        wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids), 10)
