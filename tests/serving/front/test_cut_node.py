"""A node whose packets vanish: what waits for its replica is answered by another. Network namespaces, as root."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from load_generator import Load, chat_body
from ports import free_port
from upstreams import Upstream

from swift_dist.serving.front.haproxy import Front
from swift_dist.serving.front.options import FrontOptions
from swift_dist.serving.front.state import FrontState, Replica, Route, Version

sys.path.insert(0, str(Path(__file__).parents[2] / "doctor"))
from namespaces import BRIDGE, Network, missing, sh

pytestmark = [pytest.mark.testbed, pytest.mark.skipif(missing() is not None, reason=str(missing()))]
FRONT = "10.219.7.1"  # the bridge's own address: the front runs outside of the namespaces


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(2) as network:
        sh(f"ip addr add {FRONT}/24 dev {BRIDGE}")
        yield network
        for number in range(2):  # connections of a cut node keep its namespace, and with it the link
            sh(f"ip link del {BRIDGE}v{number}", check=False)


@pytest.fixture
def replicas(network: Network) -> Iterator[list[Upstream]]:
    """A server on each of two nodes."""
    made: list[Upstream] = []
    try:
        for number, (name, address) in enumerate(zip(network.names, network.addresses, strict=True)):
            sh(f"ip link set {BRIDGE}v{number} up")
            made.append(Upstream(f"node{number}", address, ["nsenter", f"--net=/run/netns/{name}"]))
        yield made
    finally:
        for upstream in made:
            upstream.__exit__(None, None, None)


def cut(number: int) -> None:
    sh(f"ip link set {BRIDGE}v{number} down")


def front_of(tmp_path: Path, replicas: list[Upstream]) -> Front:
    version = Version("v1", tuple(Replica(u.name, u.host, u.port) for u in replicas))
    return Front(tmp_path, FrontOptions(port=free_port())).start(
        FrontState((Route(("m",), (version,)),), ("127.0.0.1", 9))
    )


@contextlib.contextmanager
def kept(front: Front) -> Iterator[Front]:
    """Looked after every second, as a deployment does, and stopped in the end."""
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(1):
            front.ensure()

    keeper = threading.Thread(target=keep)
    keeper.start()
    try:
        yield front
    finally:
        ended.set()
        keeper.join()
        front.stop(drain=0)


def test_a_cut_node_loses_no_request(replicas: list[Upstream], tmp_path: Path) -> None:
    """64 at a time, 1,000 in all."""
    with kept(front_of(tmp_path, replicas)) as front:
        load = Load(front.url, [chat_body("m", "x", delay=0.3)], concurrency=64, requests=1000)
        with load.in_background() as running:
            running.wait_for(200)
            cut(0)
        report = running.report
        assert not report.failures, report.describe()
        longest = max(answer.seconds for answer in report.answers)
        print(f"longest answer {longest:.1f} s")
        assert longest < 30


def test_a_request_on_its_way_to_a_node_that_is_cut_is_answered_by_another(
    replicas: list[Upstream], tmp_path: Path
) -> None:
    """The node has not acknowledged all of it: keepalive's probes are not sent. An engine that hangs is enough."""
    with kept(front_of(tmp_path, replicas)) as front:
        replicas[0].stop_answering()
        with Load(front.url, [chat_body("m", "x" * 600_000)], concurrency=2, requests=2).in_background() as running:
            running.wait_for(1)
            cut(0)
        report = running.report
        assert not report.failures, report.describe()
        assert replicas[1].seen()["began"] == 2
        assert max(answer.seconds for answer in report.answers) < 30


def test_a_silent_node_that_is_there_is_waited_for(replicas: list[Upstream], tmp_path: Path) -> None:
    """As long as a prefill may take: keepalive probes are answered by the kernel, whatever the engine does."""
    front = front_of(tmp_path, replicas[:1])
    try:
        load = Load(front.url, [chat_body("m", "x", delay=12), chat_body("m", "x", first_delay=12, stream=True)], 2, 2)
        began = time.monotonic()
        report = load.run()
        assert not report.failures and time.monotonic() - began > 12
        assert replicas[0].seen()["began"] == 2
    finally:
        front.stop(drain=0)


def test_a_stream_from_a_cut_node_ends_with_an_error(replicas: list[Upstream], tmp_path: Path) -> None:
    front = front_of(tmp_path, replicas[:1])
    try:
        body = chat_body("m", "x", stream=True, events=1000, delay=0.05)
        threading.Timer(1.0, cut, [0]).start()
        (answer,) = Load(front.url, [body], 1, 1).run().answers
        assert answer.error is not None and "stream_interrupted" in answer.error
        assert 5 < answer.seconds < 30
    finally:
        front.stop(drain=0)
