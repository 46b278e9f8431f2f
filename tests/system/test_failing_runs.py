"""What goes wrong once a run is under way, or in the folder that it finds: exit code, message, nothing half-written."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import Command
from same_end import assert_same_end
from test_kill import wait_for_step
from toy_job import INTERVAL, STEPS, Run

from swift_dist.checkpoint import open_checkpoint

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
Start = Callable[..., Command]
MIB = 2**20


@contextlib.contextmanager
def small_disk(path: Path, size: int) -> Iterator[Path]:
    """A disk of `size` bytes, mounted at `path`."""
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a disk takes root")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def can_mount(path: Path) -> bool:
    try:
        with small_disk(path, MIB):
            return True
    except pytest.skip.Exception:
        return False


def assert_write_failed(command: Command, reason: str, remedy: str) -> None:
    """Exit 1 and one message, which names rank, folder, reason and remedy."""
    assert command.wait() == 1, command.stderr
    message = command.stderr[command.stderr.index("swift-dist: ") :]
    assert command.stderr.count("swift-dist: ") == 1 and "Traceback" not in command.stderr, command.stderr
    head, _, advice = message.partition("\n  remedy: ")
    assert "could not be written: rank " in head and reason in head, message
    assert remedy in advice and "run the same command again" in advice, message
    answer = command.result()
    assert answer["exit_code"] == 1 and answer["error"]["kind"] == "run" and remedy in answer["error"]["remedy"]
    command.assert_nothing_left()


def test_a_full_disk_at_a_checkpoint(undisturbed: Run, start: Start, tmp_path: Path) -> None:
    """A disk with room for one checkpoint; with more room, the same command goes on from it."""
    size = sum(f.stat().st_size for f in (undisturbed.output / "checkpoints" / f"step_{STEPS}").iterdir())
    with small_disk(tmp_path / "disk", int(1.5 * size)) as disk:
        output = disk / "run"
        words = (*undisturbed.words, "--output", str(output))
        assert_write_failed(start(*words), "No space left on device", f"free space on the disk of {output}")
        assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["latest", f"step_{INTERVAL}"]
        assert open_checkpoint(output).step == INTERVAL
        status = start("runs", "show", str(output), "--json")
        assert status.wait() == 0 and status.result()["status"] == "failed"
        subprocess.run(["mount", "-o", f"remount,size={64 * MIB}", str(disk)], check=True)
        again = start(*words)
        assert again.wait() == 0, again.stderr
        assert_same_end(output, undisturbed)


def test_a_file_size_limit_at_a_checkpoint(undisturbed: Run, start: Start, tmp_path: Path) -> None:
    """The same where mounting a disk takes a right that we lack: ranks that may write no large file any more."""
    if can_mount(tmp_path / "disk"):
        pytest.skip("the test with a full disk runs")
    output = tmp_path / "run"
    words = (*undisturbed.words, "--output", str(output))
    command = start(*words)
    wait_for_step(command, output, INTERVAL + 1)
    for rank in command.ranks():
        resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (MIB // 2, MIB // 2))
    assert_write_failed(command, "File too large", "ulimit -f")
    kept = open_checkpoint(output).step
    assert kept < STEPS and not list((output / "checkpoints").glob("*tmp*"))
    again = start(*words)
    assert again.wait() == 0, again.stderr
    assert_same_end(output, undisturbed)


def test_a_truncated_checkpoint_is_passed_over(undisturbed: Run, start: Start, tmp_path: Path) -> None:
    """The newest one lost the end of a file: the run goes on from the one before it, and ends the same."""
    output = tmp_path / "run"
    shutil.copytree(undisturbed.output, output)
    shards = output / "checkpoints" / f"step_{STEPS}" / "__1_0.distcp"
    os.truncate(shards, shards.stat().st_size // 2)
    command = start(*undisturbed.words, "--output", str(output))
    assert command.wait() == 0, command.stderr
    assert f"checkpoint step_{STEPS} is passed over: {shards}" in command.stderr
    assert_same_end(output, undisturbed)


def test_a_run_folder_in_use_is_refused(undisturbed: Run, start: Start, tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = (*undisturbed.words, "--output", str(output))
    first = start(*words)
    wait_for_step(first, output, 1)
    second = start(*words)
    assert second.wait() == 2, second.stderr
    error = second.result()["error"]
    assert error["key"] == "output" and f"in use: process {first.process.pid}" in error["message"]
    assert f"swift-dist runs stop {output}" in error["remedy"]
    second.assert_nothing_left()
    first.process.send_signal(signal.SIGINT)
    assert first.wait() == 130, first.stderr  # it was not disturbed
