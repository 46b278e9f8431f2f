"""Whole runs whose ranks or driver are killed, stopped or interrupted: each ends with the weights of a quiet run."""

from __future__ import annotations

import json
import os
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from killer import Killer
from same_end import assert_same_end
from toy_job import STEPS, Run

from swift_dist.checkpoint import open_checkpoint

pytestmark = pytest.mark.timeout(900)
Start = Callable[..., Command]


def finish(command: Command, output: Path, quiet: Run, kills: int) -> None:
    """It ends by itself, as if nothing had been. Kills in quick succession are one restart."""
    assert command.wait() == 0, command.stderr
    result = command.result()
    assert (result["state"], result["step"], result["checkpoint"]) == ("done", STEPS, STEPS)
    assert 0 < result["restarts"] <= kills
    assert command.stderr.count("its process ended without a word") == result["restarts"]
    command.assert_nothing_left()
    assert_same_end(output, quiet)


@pytest.mark.slow
def test_ten_kills(undisturbed: Run, start: Start, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = start(*undisturbed.words, "--output", str(output))
    killer = Killer(command, output, seed=random.randrange(10**6))
    killer.start_up("import")
    killer.start_up("build")
    killer.step(1, 4)
    killer.writing()
    killer.start_up("import")  # of the replacement, or of a survivor
    killer.step(8, 20)
    killer.any_moment(seconds=4.0)
    killer.writing()
    killer.step(22, STEPS - 2)
    killer.final_save(STEPS)
    assert len(killer.hits) == 10
    finish(command, output, undisturbed, kills=10)


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_run_recovers(undisturbed: Run, start: Start, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = start(*undisturbed.words, "--output", str(output), "--cluster.stall_timeout", "8")
    stepping = command.until(lambda: [r for r in command.ranks() if r.step >= 6 and r.phase == "step"], "step 6")
    pid = random.choice(stepping).pid
    os.kill(pid, signal.SIGSTOP)
    assert command.wait() == 0, command.stderr
    rank = next(rank for rank in (0, 1) if f"process {pid}\n" in (output / "logs" / f"rank_{rank}.log").read_text())
    named = re.search(rf"rank {rank} on \S+, step (\d+): no step for .* this rank is behind .*SIGSTOP", command.stderr)
    assert named and int(named[1]) >= 6, command.stderr
    driver_log, manifest = (output / "logs" / "driver.log").read_text(), (output / "manifest.json").read_text()
    assert named[0] in driver_log and named[0] in manifest
    assert "state T" in (output / "logs" / "stall-0" / f"rank_{rank}.txt").read_text()
    command.assert_nothing_left()
    assert_same_end(output, undisturbed)


@pytest.mark.slow
def test_interrupted_in_every_way_and_started_again(undisturbed: Run, start: Start, tmp_path: Path) -> None:
    """Ctrl-C, SIGTERM, `runs stop` and SIGKILL of the driver; the same command again each time, at last to the end."""
    output = tmp_path / "run"
    words = (*undisturbed.words, "--output", str(output))
    ways: list[Callable[[Command], Any]] = [
        lambda command: command.process.send_signal(signal.SIGINT),
        lambda command: command.process.send_signal(signal.SIGTERM),
        lambda command: start("runs", "stop", str(output)).wait(),
    ]
    done = 0
    for interrupt in ways:
        command, wanted = start(*words), done + 3
        wait_for_step(command, output, wanted)
        interrupt(command)
        assert command.wait() == 130, command.stderr
        result = command.result()
        assert result["state"] == "interrupted" and wanted <= result["step"] < STEPS
        done = result["step"]
        assert result["checkpoint"] == done == open_checkpoint(output).step == metrics_step(output)
        assert "Traceback" not in command.stderr
        command.assert_nothing_left()
    command = start(*words)
    wait_for_step(command, output, done + 3)
    command.process.kill()
    command.wait()
    command.assert_nothing_left()
    command = start(*words)
    assert command.wait() == 0, command.stderr
    assert command.result()["state"] == "done" and command.result()["restarts"] == 0
    command.assert_nothing_left()
    assert_same_end(output, undisturbed)


def wait_for_step(command: Command, output: Path, step: int) -> None:
    command.until(lambda: metrics_step(output) >= step, f"step {step}")


def metrics_step(output: Path) -> int:
    """The newest step in metrics.jsonl."""
    rows = (output / "metrics.jsonl").read_text().splitlines() if (output / "metrics.jsonl").exists() else []
    return json.loads(rows[-1])["step"] if rows else 0
