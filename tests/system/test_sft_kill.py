"""Fine-tuning through the command line, killed and interrupted at chosen moments: in every bit the quiet end."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import Command
from killer import Killer
from same_end import metrics
from sft_job import (
    INTERVAL,
    ROWS,
    STEPS,
    Files,
    assert_same_end,
    assert_same_weights,
    exported,
    newest_row,
    samples_seen,
    write_files,
)

from swift_dist.checkpoint import open_checkpoint
from swift_dist.cluster.heartbeat import process_state

SUPPORT = Path(__file__).parents[1] / "support"
pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
Start = Callable[..., Command]
Quiet = Callable[[str], Path]
STRATEGIES = {
    "zero3": ("--deepspeed", "zero3", "--tuner_type", "lora"),
    "fsdp2": ("--fsdp", "fsdp2"),
    "shared": ("--fsdp", "fsdp2", "--sequence_parallel_size", "2"),
    "ring": ("--deepspeed", "zero3", "--sequence_parallel_size", "2", "--parallel.ulysses_size", "1"),
}
ALL = ["zero3", *(pytest.param(name, marks=pytest.mark.table) for name in ("fsdp2", "shared", "ring"))]
BOTH_IN_THE_TABLE = [pytest.param(name, marks=pytest.mark.table) for name in ("zero3", "fsdp2")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def quiet(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Quiet]:
    """The run folder of a strategy's run on two ranks that nothing disturbed."""
    done: dict[str, Path] = {}

    def run(strategy: str) -> Path:
        if strategy not in done:
            folder = tmp_path_factory.mktemp(strategy)
            command = Command([*files.words(*STRATEGIES[strategy]), "--output", str(folder / "run")], folder)
            try:
                assert command.wait() == 0, command.stderr
                assert command.result()["restarts"] == 0
                command.assert_nothing_left()
            finally:
                command.kill_everything()
            done[strategy] = folder / "run"
        return done[strategy]

    yield run


def partial(output: Path) -> list[Path]:
    """An export that is being written."""
    return [*output.glob(".model.partial"), *output.glob(".adapter.partial")]


def stopping_at_export(tmp_path: Path) -> dict[str, str]:
    """Variables with which the rank that writes the final weights stops in the middle, the first time."""
    return {"PYTHONPATH": str(SUPPORT / "stop_at_export"), "SWIFT_DIST_TEST_STOPPED": str(tmp_path / "stopped")}


def stopped_at_export(command: Command, tmp_path: Path) -> int:
    """The process of that rank, once it stands."""
    place = tmp_path / "stopped"
    pid = int(command.until(lambda: place.exists() and place.read_text(), "its export"))
    command.until(lambda: process_state(pid) == "T", "a rank that stands")
    return pid


@pytest.mark.parametrize("strategy", ALL)
def test_killed_ranks(files: Files, quiet: Quiet, start: Start, tmp_path: Path, strategy: str) -> None:
    """In a step, while a checkpoint is written, while the final weights are: it goes on by itself."""
    expected, output = quiet(strategy), tmp_path / "run"
    words = [*files.words(*STRATEGIES[strategy]), "--output", str(output)]
    command = start(*words, **stopping_at_export(tmp_path))
    killer = Killer(command, output, seed=random.randrange(10**6))
    killer.step(2, 10)
    killer.writing()
    writer = stopped_at_export(command, tmp_path)
    assert partial(output)
    os.kill(random.choice([rank.pid for rank in command.ranks()]), signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(writer, signal.SIGCONT)
    assert command.wait() == 0, command.stderr
    result = command.result()
    assert (result["state"], result["step"], result["checkpoint"]) == ("done", STEPS, STEPS)
    assert 0 < result["restarts"] <= 3 and Path(result["export"]).parent == output
    assert command.stderr.count("its process ended without a word") == result["restarts"]
    command.assert_nothing_left()
    assert_same_end(output, expected)


@pytest.mark.parametrize("strategy", BOTH_IN_THE_TABLE)
def test_interrupted_then_without_a_driver(
    files: Files, quiet: Quiet, start: Start, tmp_path: Path, strategy: str
) -> None:
    """Ctrl-C checkpoints; SIGKILL of the driver leaves no process; the same command goes on each time."""
    expected, output = quiet(strategy), tmp_path / "run"
    words = [*files.words(*STRATEGIES[strategy]), "--output", str(output)]
    command = start(*words)
    command.until(lambda: newest_row(output) >= 3, "step 3")
    command.process.send_signal(signal.SIGINT)
    assert command.wait() == 130, command.stderr
    result = command.result()
    assert result["state"] == "interrupted" and 3 <= result["step"] < STEPS and result["export"] is None
    assert result["checkpoint"] == result["step"] == open_checkpoint(output).step == newest_row(output)
    assert "Traceback" not in command.stderr and not partial(output)
    command.assert_nothing_left()
    command = start(*words)
    command.until(lambda: newest_row(output) >= result["step"] + 2, "two steps more")
    command.process.kill()
    command.wait()
    command.assert_nothing_left()
    command = start(*words)
    assert command.wait() == 0, command.stderr
    assert command.result()["state"] == "done" and command.result()["restarts"] == 0
    command.assert_nothing_left()
    assert_same_end(output, expected)


@pytest.mark.parametrize("strategy", BOTH_IN_THE_TABLE)
def test_killed_while_exporting_a_run_that_went_on(
    files: Files, quiet: Quiet, start: Start, tmp_path: Path, strategy: str
) -> None:
    """A finished run gets an epoch more; driver and ranks die at its export. What lies there is the old export: the
    same command writes the new one."""
    shutil.copytree(quiet(strategy), tmp_path / "run")
    output, steps = tmp_path / "run", 2 * STEPS
    words = [*files.words(*STRATEGIES[strategy], "--train.epochs", "2"), "--output", str(output)]
    command = start(*words, **stopping_at_export(tmp_path))
    stopped_at_export(command, tmp_path)  # it stays stopped: if it outlived its driver it could finish the export
    command.process.kill()
    command.kill_everything()
    assert open_checkpoint(output).step == steps
    assert_same_weights(output, quiet(strategy))
    command = start(*words)
    assert command.wait() == 0, command.stderr
    assert command.result()["step"] == steps and not partial(output)
    assert newest_row(output) == steps
    old, new = exported(quiet(strategy)), exported(output)
    assert all(float((new[name] - old[name]).abs().max()) > 0 for name in new)
    again = start(*words)
    assert again.wait() == 0 and f"is at step {steps} of {steps}" in again.stderr


@pytest.mark.parametrize("strategy", BOTH_IN_THE_TABLE)
def test_from_four_ranks_to_two(files: Files, quiet: Quiet, start: Start, tmp_path: Path, strategy: str) -> None:
    """Interrupted on four ranks, ended on two: every row exactly once, the curve of a run on two."""
    expected, output = quiet(strategy), tmp_path / "run"
    command = start(*files.words(*STRATEGIES[strategy], ranks=4), "--output", str(output))
    command.until(lambda: newest_row(output) >= INTERVAL + 1, "some steps")
    command.process.send_signal(signal.SIGINT)
    assert command.wait() == 130, command.stderr
    there = command.result()["step"]
    assert INTERVAL < there < STEPS
    command = start(*files.words(*STRATEGIES[strategy], ranks=2), "--output", str(output))
    assert command.wait() == 0, command.stderr
    seen = samples_seen(output, [4, 2], [range(there), range(there, STEPS)])
    assert len(seen) == ROWS and set(seen.values()) == {1}
    for got, wanted in zip(metrics(output), metrics(expected), strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
    for name, tensor in exported(output).items():
        assert float((tensor - exported(expected)[name]).abs().max()) < 1e-4
