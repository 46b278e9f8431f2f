"""A driver process that is interrupted or killed leaves nothing running; simulated nodes; attaching to a cluster."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swift_dist.cluster.heartbeat import process_state

HERE = Path(__file__).parent
MARK = "SWIFT_DIST_TEST_MARK"
pytestmark = pytest.mark.timeout(600)


class Driver:
    """A driver with everything it starts, recognised by a variable in the environment."""

    def __init__(self, run_dir: Path, payload: dict[str, Any], address: str = "", **settings: Any) -> None:
        self.run_dir, self.mark = run_dir, uuid.uuid4().hex
        variables = {k: v for k, v in os.environ.items() if address or not k.startswith("RAY_")}
        variables.update({MARK: self.mark, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})
        if address:
            variables["RAY_ADDRESS"] = address
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "driver.py"), str(run_dir), json.dumps(payload), json.dumps(settings)],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, pattern: str, seconds: float = 200.0) -> None:
        deadline = time.monotonic() + seconds
        while not list(self.run_dir.glob(pattern)):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, f"no {pattern}"
            time.sleep(0.02)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=200)
        return self.process.returncode, out, err

    def left(self) -> list[str]:
        """Processes of this driver that still run."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes():
                    found.append(f"{entry.name}: {(entry / 'cmdline').read_bytes()[:80]!r}")
        return found

    def assert_nothing_left(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self.left() == []


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    drivers: list[Driver] = []

    def begin(payload: dict[str, Any], **settings: Any) -> Driver:
        drivers.append(Driver(tmp_path / f"run-{len(drivers)}", payload, **settings))
        return drivers[-1]

    yield begin
    for driver in drivers:
        for line in driver.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(line.split(":")[0]), signal.SIGKILL)
        driver.process.wait()


@pytest.mark.table  # tests/system/test_kill.py does it to whole runs
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_checkpoints_and_leaves_nothing(start: Any, number: signal.Signals) -> None:
    driver = start({"steps": 500, "step_seconds": 0.05})
    driver.wait_for("checkpoints/step_5.pt")
    os.killpg(driver.process.pid, number)  # as a terminal does: to the driver and what shares its group
    code, out, err = driver.end()
    assert code == 130, err
    result = json.loads(out)
    assert result["state"] == "interrupted"
    step = result["results"]["0"]["step"]
    assert (driver.run_dir / "checkpoints" / f"step_{step}.pt").exists()
    assert "stopping after a checkpoint" in err and "Traceback" not in err
    driver.assert_nothing_left(30.0)


def test_a_second_interrupt_ends_it_at_once(start: Any) -> None:
    driver = start({"steps": 500, "step_seconds": 600.0, "faults": [{"rank": 0, "phase": "build", "do": "note"}]})
    driver.wait_for("fault-0-build-any")
    time.sleep(1.0)
    driver.process.send_signal(signal.SIGINT)
    said = ""
    while "stopping after a checkpoint" not in said:  # two signals that come before one is heard are one
        line = driver.process.stderr.readline()
        assert line, said
        said += line
    driver.process.send_signal(signal.SIGINT)
    code, _, err = driver.end()  # long before the step ends
    assert code == 130 and "Traceback" not in said + err, said + err
    driver.assert_nothing_left(30.0)


def test_an_interrupt_during_the_start_ends_it(start: Any) -> None:
    driver = start({"steps": 500})
    while len(driver.left()) < 2:  # the driver and its cluster's host: it has taken the signals
        assert driver.process.poll() is None, driver.process.communicate()
        time.sleep(0.01)
    time.sleep(0.5)
    driver.process.send_signal(signal.SIGINT)
    code, _, err = driver.end()
    assert code == 130 and "Traceback" not in err, err
    driver.assert_nothing_left(30.0)


@pytest.mark.table  # tests/system/test_kill.py does it to whole runs
def test_a_killed_driver_leaves_no_orphan(start: Any) -> None:
    driver = start(
        {"steps": 500, "step_seconds": 0.05, "faults": [{"rank": 1, "phase": "step", "step": 8, "do": "stop"}]}
    )
    driver.wait_for("fault-1-step-8")
    assert len(driver.left()) > 4
    driver.process.kill()
    driver.process.wait()
    driver.assert_nothing_left(30.0)


def test_two_simulated_nodes_survive_a_kill(start: Any) -> None:
    faults = [{"rank": 1, "phase": "step", "step": 12, "do": "kill"}]
    driver = start({"steps": 20, "faults": faults}, nnodes=2, nproc_per_node=1)
    code, out, err = driver.end()
    assert code == 0, err
    results = json.loads(out)["results"]
    assert results["0"]["digest"] == results["1"]["digest"]
    assert results["1"]["attempt"] == 1 and "rank 1" in err
    driver.assert_nothing_left(30.0)


def test_attached_drivers_leave_the_cluster_and_nothing_else(start: Any, cluster: object) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    killed = start(
        {"steps": 500, "step_seconds": 0.05, "faults": [{"rank": 1, "phase": "step", "step": 8, "do": "stop"}]},
        address=address,
    )
    killed.wait_for("fault-1-step-8")
    pids = [
        int(line.rpartition(" ")[2])
        for rank in range(2)
        for line in (killed.run_dir / "logs" / f"rank_{rank}.log").read_text().splitlines()
        if ": rank " in line
    ]
    assert len(pids) == 2 and all(process_state(pid) for pid in pids)
    killed.process.kill()
    killed.process.wait()
    deadline = time.monotonic() + 60
    while any(process_state(pid) not in ("", "Z") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [process_state(pid) for pid in pids if process_state(pid) not in ("", "Z")] == []
    code, out, err = start({"steps": 5}, address=address).end()  # its resources are free again
    assert code == 0 and json.loads(out)["state"] == "done", err
    assert [node["NodeID"] for node in ray.nodes() if node["Alive"]] == nodes


def test_one_process_can_have_clusters_one_after_the_other_not_at_once() -> None:
    code = (
        "import ray\n"  # before the cluster's variables are set
        "from swift_dist.cluster.runtime import Cluster\n"
        "from swift_dist.cluster.devices import Devices\n"
        "from swift_dist.config.job import ClusterSection\n"
        "for _ in range(2):\n"
        "    with Cluster(ClusterSection()) as cluster:\n"
        "        cluster.start(Devices(False, 1))\n"
        "        cluster.connect()\n"
        "        print(ray.util.get_node_ip_address(), ray.cluster_resources()['CPU'])\n"
        "        with Cluster(ClusterSection()) as another:\n"
        "            try:\n"
        "                another.connect()\n"
        "            except Exception as error:\n"
        "                print(type(error).__name__, error.key, 'ray.shutdown()' in error.remedy)\n"
    )
    variables = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=280)
    assert done.stdout == "127.0.0.1 1.0\nJobError cluster.address True\n" * 2, done.stderr
