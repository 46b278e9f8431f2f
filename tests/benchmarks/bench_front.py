"""What the front costs: streams and short answers through HAProxy against the same server directly, in turns.

    python tests/benchmarks/bench_front.py [--streams 64] [--events 250] [--gap 0.02] [--turns 3] [--check]

The server (a process of its own) answers with canned events, `gap` seconds apart in every stream, so what is measured
is what lies between it and the client. One line a turn:

    events/s            of all streams together: directly, through the front, and the ratio
    first event         milliseconds, the median of the streams
    front's CPU         microseconds of HAProxy's CPU time for each event
    a short answer      milliseconds, the median of 300 one after another on a connection: directly, through the front

The ratio is of runs next to each other; medians over the turns count. ``--check`` fails where events/s fall below 0.9
of the direct ones.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from load_generator import Load, chat_body
from upstreams import Upstream

from swift_dist.serving.front.haproxy import Front
from swift_dist.serving.front.options import FrontOptions
from swift_dist.serving.front.state import FrontState, Replica, Route, Version

LOWEST = 0.9
SHORT = 300


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cpu_seconds(front: Front) -> float:
    times = psutil.Process(front.pids[0]).cpu_times()
    return times.user + times.system


def streams(url: str, words: argparse.Namespace) -> tuple[float, float]:
    """(events a second, milliseconds to the median stream's first event)."""
    body = chat_body("m", "x", stream=True, events=words.events, delay=words.gap)
    report = Load(url, [body], concurrency=words.streams, requests=words.streams).run()
    assert not report.failures, report.describe()
    counted = sum(len(answer.events) for answer in report.answers)
    assert counted == words.streams * words.events, counted
    return counted / report.seconds, 1e3 * statistics.median(a.first_event_seconds for a in report.answers)


def short(url: str) -> float:
    """Milliseconds of the median answer."""
    taken = []
    with httpx.Client() as client:
        for _ in range(SHORT):
            began = time.perf_counter()
            client.post(url + "/v1/chat/completions", json=chat_body("m", "x")).raise_for_status()
            taken.append(time.perf_counter() - began)
    return 1e3 * statistics.median(taken)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--events", type=int, default=250)
    parser.add_argument("--gap", type=float, default=0.02)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--check", action="store_true")
    words = parser.parse_args()
    ratios, costs = [], []
    with tempfile.TemporaryDirectory() as folder, Upstream("server") as upstream:
        replica = Replica("r", upstream.host, upstream.port)
        state = FrontState((Route(("m",), (Version("v1", (replica,)),)),), ("127.0.0.1", 9))
        front = Front(Path(folder), FrontOptions(port=free_port())).start(state)
        direct = f"http://{upstream.host}:{upstream.port}"
        try:
            for turn in range(words.turns):
                order = [direct, front.url] if turn % 2 == 0 else [front.url, direct]
                found, used = {}, 0.0
                for url in order:
                    began = cpu_seconds(front)
                    found[url] = streams(url, words)
                    used = cpu_seconds(front) - began if url == front.url else used
                ratios.append(found[front.url][0] / found[direct][0])
                costs.append(1e6 * used / (words.streams * words.events))
                print(
                    f"events/s {found[direct][0]:.0f} directly, {found[front.url][0]:.0f} through the front: "
                    f"{ratios[-1]:.3f} | first event {found[direct][1]:.1f}, {found[front.url][1]:.1f} ms | "
                    f"front's CPU {costs[-1]:.1f} us an event | "
                    f"a short answer {short(direct):.2f}, {short(front.url):.2f} ms",
                    flush=True,
                )
        finally:
            front.stop(drain=0)
    ratio = statistics.median(ratios)
    print(f"median: {ratio:.3f} of the direct events/s, {statistics.median(costs):.1f} us an event")
    return int(words.check and ratio < LOWEST)


if __name__ == "__main__":
    sys.exit(main())
