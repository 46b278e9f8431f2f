"""The same job without Ray: `--launcher torchrun` ends as the Ray gang does, to the last bit."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Command
from same_end import assert_same_end
from test_kill import metrics_step, wait_for_step
from toy_job import STEPS, Run

from swift_dist.checkpoint import open_checkpoint
from swift_dist.launchers.torchrun import PORTS, first_port

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]
Start = Callable[..., Command]
TORCHRUN = ("--launcher", "torchrun")


def rank_processes(command: Command) -> list[int]:
    """Processes of torchrun's ranks below a command."""
    return [int(line.partition(":")[0]) for line in command.left() if "swift_dist.torchrun.rank" in line]


def test_the_same_run_through_every_disturbance(undisturbed: Run, start: Start, tmp_path: Path) -> None:
    """A rank killed; Ctrl-C and the same command again, to the end."""
    output = tmp_path / "run"
    words = (*undisturbed.words, *TORCHRUN, "--output", str(output))
    command = start(*words)
    wait_for_step(command, output, 6)
    os.kill(rank_processes(command)[-1], signal.SIGKILL)
    wait_for_step(command, output, 12)
    command.process.send_signal(signal.SIGINT)
    assert command.wait() == 130, command.stderr
    result = command.result()
    assert result["state"] == "interrupted" and result["restarts"] == 1 and 12 <= result["step"] < STEPS
    assert result["checkpoint"] == result["step"] == open_checkpoint(output).step == metrics_step(output)
    command.assert_nothing_left()
    command = start(*words)
    assert command.wait() == 0, command.stderr
    assert (command.result()["state"], command.result()["step"]) == ("done", STEPS)
    command.assert_nothing_left()
    assert_same_end(output, undisturbed)
    names = {path.name for path in output.iterdir()}
    assert names == {path.name for path in undisturbed.output.iterdir()}


def test_two_nodes_that_start_on_their_own(undisturbed: Run, start: Start, tmp_path: Path) -> None:
    """The tensor-parallel pair on two nodes, each with a command of its own; both say how it ended."""
    output = tmp_path / "run"
    words = (*undisturbed.words, *TORCHRUN, "--output", str(output), "--nnodes", "2", "--nproc_per_node", "1")
    words = (*words, "--launch.torchrun.endpoint", "127.0.0.1")
    taken = PORTS[first_port(output)]  # by another job
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(socket.create_server(("", taken)))
        nodes = [start(*words, "--launch.torchrun.node_rank", str(rank)) for rank in (1, 0)]
        for node in nodes:
            assert node.wait() == 0, node.stderr
            assert (node.result()["state"], node.result()["step"]) == ("done", STEPS)
            node.assert_nothing_left()
    assert_same_end(output, undisturbed)
    assert {path.name for path in output.iterdir()} == {path.name for path in undisturbed.output.iterdir()}


def test_a_rank_killed_on_one_of_two_nodes_is_named_on_both(undisturbed: Run, start: Start, tmp_path: Path) -> None:
    """Then another job for one node is refused, and the same commands go on to the end."""
    output = tmp_path / "run"
    words = (*undisturbed.words, *TORCHRUN, "--output", str(output), "--nnodes", "2", "--nproc_per_node", "1")
    first = (*words, "--launch.torchrun.endpoint", "127.0.0.1")
    second = (*words, "--launch.torchrun.node_rank", "1")
    nodes = [start(*first), start(*second)]
    wait_for_step(nodes[0], output, 6)
    os.kill(rank_processes(nodes[1])[0], signal.SIGKILL)
    for node in nodes:
        assert node.wait(60) == 1, node.stderr
        assert "ended without a word (killed, out of memory, or crashed)" in node.result()["error"]["message"]
        assert node.stderr.count("remedy: ") == 1
        node.assert_nothing_left()
    nodes = [start(*first), start(*second, "--checkpoint.interval", "9")]
    assert [node.wait(60) for node in nodes] == [1, 2]
    assert all("checkpoint.interval" in node.result()["error"]["message"] for node in nodes)
    nodes = [start(*first), start(*second)]
    for node in nodes:
        assert node.wait() == 0, node.stderr
    assert_same_end(output, undisturbed)


def test_a_driver_that_is_killed_leaves_no_rank(undisturbed: Run, start: Start, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = start(*undisturbed.words, *TORCHRUN, "--output", str(output))
    wait_for_step(command, output, 3)
    command.process.kill()
    command.wait()
    command.assert_nothing_left(seconds=60)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (
            ("--nnodes", "2", "--launch.torchrun.endpoint", "n1", "--launch.torchrun.node_rank", "2"),
            "launch.torchrun.node_rank",
        ),
        (("--nnodes", "2", "--launch.torchrun.endpoint", "n1:x"), "launch.torchrun.endpoint"),
        (("--nproc_per_node", "3"), "cluster.nproc_per_node"),
    ],
)
def test_wrong_jobs(undisturbed: Run, start: Start, tmp_path: Path, words: tuple[str, ...], key: str) -> None:
    output = tmp_path / "run"
    command = start(*undisturbed.words, *TORCHRUN, "--output", str(output), *words)
    assert command.wait() == 2, command.stderr
    assert command.result()["error"]["key"] == key
    assert not output.exists()


def test_a_run_that_cannot_go_on_says_why_once(undisturbed: Run, start: Start, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = start(*undisturbed.words, *TORCHRUN, "--output", str(output), "--optimizer.lr", "1e30")
    assert command.wait() == 1, command.stderr
    assert "step 2 (samples 8-15 of the data order): the " in command.result()["error"]["message"]
    assert command.stderr.count("swift-dist: ") == 1 and "Traceback" not in command.stderr
    command.assert_nothing_left()
