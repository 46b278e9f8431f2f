"""Several nodes as network namespaces: a healthy team, a cut and a slow link, a node with another file system."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from namespaces import BRIDGE, NamespaceTeam, Network, missing, sh

from swift_dist.doctor.examine import Report, all_checks, examine
from swift_dist.doctor.values import Exam
from swift_dist.runs.manifest import versions

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.timeout(180),
    pytest.mark.slow,
]


@pytest.fixture
def three() -> Iterator[Network]:
    with Network(3) as network:
        yield network
    deadline = time.monotonic() + 20  # the kernel takes a namespace's links away after its last process
    while sh(f"ip -brief link show | grep {BRIDGE}", check=False) == 0:
        assert time.monotonic() < deadline, "a link is left"
        time.sleep(0.1)


def look(network: Network, folder: Path, *checks: str, prepare: Mapping[str, str] | None = None, **exam: Any) -> Report:
    wanted = Exam(**{"token": "t", "folder": str(folder), "nnodes": 3, "versions": versions(), **exam})
    team = NamespaceTeam(network, wanted, seconds=60, prepare=prepare)
    try:
        return examine(team, all_checks(checks))
    finally:
        team.close()


def test_three_healthy_nodes(three: Network, tmp_path: Path) -> None:
    began = time.monotonic()
    report = look(three, tmp_path)
    assert report.bad == []
    network = next(f for f in report.findings if (f.check, f.level) == ("network", "ok"))
    assert network.found.startswith("3 pairs of nodes: all-reduce ") and "; 3 ranks: all-reduce " in network.found
    assert time.monotonic() - began < 60
    print(f"{time.monotonic() - began:.1f} s", report.seconds)


def test_an_unreachable_pair_is_named(three: Network, tmp_path: Path) -> None:
    sh(f"ip -n {three.names[0]} route add blackhole {three.addresses[2]}/32")
    (found,) = look(three, tmp_path, "network").findings
    assert (found.node, found.level) == ("n1+n3", "bad") and found.nodes == ("n1", "n3")
    assert "do not reach each other" in found.found and "open all TCP ports" in found.advice


def test_an_unreachable_node_is_named_once(three: Network, tmp_path: Path) -> None:
    sh(f"ip -n {three.names[1]} link set eth0 down")  # the control channel of these tests does not use it
    (found,) = look(three, tmp_path, "network").findings
    assert (found.node, found.level) == ("n2", "bad") and "is reached by no other node" in found.found


def test_a_slow_node_is_named_with_its_speed(three: Network, tmp_path: Path) -> None:
    sh(f"tc -n {three.names[2]} qdisc add dev eth0 root tbf rate 40mbit burst 64kbit latency 400ms")
    (found, *rest) = look(three, tmp_path, "network").findings
    assert (found.node, found.level) == ("n3", "bad") and not [f for f in rest if f.level == "bad"]
    assert "is slow with every other node" in found.found and "ethtool" in found.advice
    speed, unit = found.found.split("all-")[1].split(" ")[1:3]
    assert unit.startswith("MB/s") and 1 < float(speed) < 8, "40 Mbit/s are 5 MB/s"


def test_a_node_with_a_file_system_of_its_own(three: Network, tmp_path: Path) -> None:
    own = {"n2": f"mount -t tmpfs tmpfs {tmp_path}"}
    (found,) = look(three, tmp_path, "shared_folder", prepare=own).findings
    assert (found.node, found.level) == ("n2", "bad")
    assert f"does not see in {tmp_path} what was written on n1 (No such file or directory), n3" in found.found
    assert f"mount the same file system at {tmp_path} on every node" in found.advice
    assert list(tmp_path.iterdir()) == []


def test_a_node_that_may_not_write_the_share(three: Network, tmp_path: Path) -> None:
    read_only = {"n3": f"mount --bind {tmp_path} {tmp_path} && mount -o remount,bind,ro {tmp_path}"}
    (found,) = look(three, tmp_path, "shared_folder", prepare=read_only).findings
    assert (found.node, found.level) == ("n3", "bad") and "cannot be written: Read-only file system" in found.found


def test_a_full_disk_of_one_node(three: Network, tmp_path: Path) -> None:
    full = {"n2": f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"}
    (found,) = look(three, tmp_path, "space", prepare=full, checkpoint_bytes=2**20, num_checkpoints=2).findings
    assert found.level == "bad" and f"1.0 MiB free at {tmp_path} (on n2); the job needs 2.0 MiB" in found.found


def test_small_shared_memory_of_one_node(three: Network, tmp_path: Path) -> None:
    small = {"n1": "mount -t tmpfs -o size=64m tmpfs /dev/shm"}
    (found,) = look(three, tmp_path, "shared_memory", prepare=small).findings
    assert (found.node, found.level) == ("n1", "bad") and "64.0 MiB free of 64.0 MiB" in found.found
    assert "--shm-size" in found.advice


def test_a_name_server_that_is_silent(three: Network, tmp_path: Path) -> None:
    silent = tmp_path / "resolv.conf"
    silent.write_text(f"nameserver {three.addresses[2]}9\noptions timeout:2 attempts:1\n")
    prepare = {"n1": f"mount --bind {silent} /etc/resolv.conf"}
    found = next(f for f in look(three, tmp_path, "names", prepare=prepare).findings if f.node == "n1")
    assert found.level in ("warn", "bad") and "reverse look-up of its own name took" in found.found
    assert "/etc/resolv.conf" in found.advice
