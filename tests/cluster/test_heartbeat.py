"""The beat record: written without waiting, read from outside, gone with the processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from swift_dist.cluster.agent import NodeAgent
from swift_dist.cluster.heartbeat import Beat, Listener, Pulse


def test_a_beat_is_read_as_it_was_written() -> None:
    listener = Listener()
    assert listener.read() == Beat()
    pulse = Pulse(listener.path)
    pulse.beat("save", 7)
    beat = listener.read()
    assert (beat.pid, beat.step, beat.phase, beat.median_step) == (os.getpid(), 7, "save", None)
    assert 0 <= beat.age < 10 and beat.state in ("R", "S")
    assert not pulse.stop_requested() and not pulse.aborted()
    listener.request_stop()
    assert pulse.stop_requested() and not pulse.aborted()
    listener.abort()
    listener.request_stop(False)
    assert pulse.aborted() and not pulse.stop_requested()
    listener.close()


def test_the_median_leaves_out_the_first_step_and_other_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    listener = Listener()
    pulse = Pulse(listener.path)

    def take(phase: str, step: int, seconds: float) -> None:
        pulse.beat(phase, step)
        now[0] += seconds

    take("step", 0, 100.0)
    take("step", 1, 1.0)
    take("step", 2, 3.0)
    take("save", 3, 50.0)
    take("step", 3, 2.0)
    pulse.beat("final", 4)
    assert listener.read().median_step == 2.0
    pulse.start_attempt()
    pulse.beat("build", 0)
    assert listener.read().median_step is None


def test_beating_is_cheap() -> None:
    pulse = Pulse(Listener().path)
    took = []
    for attempt in range(5):
        began = time.perf_counter()
        for step in range(200):
            pulse.beat("step", step)
            pulse.stop_requested()
        took.append((time.perf_counter() - began) / 200)
        assert attempt < 5
    assert min(took) < 100e-6


@pytest.fixture
def process(request: pytest.FixtureRequest):
    """A child that beats once and then sleeps, under an agent's eye."""
    agent = NodeAgent()
    path = agent.offer(["p"])["p"]
    code = (
        "import sys, time\nfrom swift_dist.cluster.heartbeat import Pulse\n"
        "p = Pulse(sys.argv[1]); p.beat('step', 3); print('up', flush=True)\n"
        "def sleeps_here():\n    time.sleep(600)\nsleeps_here()"
    )
    child = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    assert child.stdout and child.stdout.readline() == b"up\n"
    yield agent, child
    child.kill()
    child.wait()
    child.stdout.close()
    agent.forget(["p"])


def test_an_agent_sees_stops_dumps_and_kills(process: tuple[NodeAgent, subprocess.Popen]) -> None:
    agent, child = process
    assert agent.read()["p"].step == 3
    assert "sleeps_here" in agent.dump_stacks(["p"])["p"]
    child.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while agent.read()["p"].state != "T" and time.monotonic() < deadline:
        time.sleep(0.01)
    stacks = agent.dump_stacks(["p"])["p"]
    assert "state T" in stacks and "Name:" in stacks
    agent.kill(["p"])
    assert child.wait(60) == -signal.SIGKILL
    assert agent.read()["p"].state == ""
    assert "the process is gone" in agent.dump_stacks(["p"])["p"]
