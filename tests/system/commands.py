"""The real command line as a child process: what it starts is found again, its ranks are seen through their beats."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift_dist.cluster.heartbeat import _RECORD, PHASES, process_state

MARK = "SWIFT_DIST_TEST_MARK"
PATIENCE = 240.0
"""Seconds to wait for anything that takes some ten seconds on a quiet machine."""


@dataclass(frozen=True)
class Rank:
    """A rank's process as its beat record shows it from outside."""

    pid: int
    step: int
    phase: str


class Command:
    """`swift-dist WORDS...` with everything it starts, which carries a mark in its environment."""

    def __init__(self, words: list[str], folder: Path, more: Mapping[str, str] | None = None) -> None:
        self.mark = uuid.uuid4().hex
        self.out, self.err = folder / f"{self.mark}.out", folder / f"{self.mark}.err"
        variables = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "NPROC_PER_NODE"}
        variables.update({MARK: self.mark, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | dict(more or {}))
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "swift_dist.cli", *words],
                env=variables,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit code."""
        return self.process.wait(timeout=seconds)

    @property
    def stderr(self) -> str:
        return self.err.read_text()

    def result(self) -> dict[str, Any]:
        """Its stdout, which must be one JSON object."""
        value = json.loads(self.out.read_text())
        assert isinstance(value, dict)
        return value

    def until(self, condition: Callable[[], Any], what: str, seconds: float = PATIENCE, pause: float = 0.01) -> Any:
        """The first true value of `condition`, while the command runs."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert self.process.poll() is None, f"ended before {what}:\n{self.stderr}"
            assert time.monotonic() < deadline, f"no {what} within {seconds} s:\n{self.stderr}"
            time.sleep(pause)
        return value

    def ranks(self) -> list[Rank]:
        """Every process that beats now, rank or spare. Read from the driver's memory files, as a debugger would."""
        found = []
        with contextlib.suppress(OSError):
            for entry in (Path("/proc") / str(self.process.pid) / "fd").iterdir():
                with contextlib.suppress(OSError, ValueError):  # it has no size yet
                    if "memfd:swift_dist-beat" in str(entry.readlink()):
                        found.append(_read_beat(entry))
        return [rank for rank in found if rank and process_state(rank.pid) not in ("", "Z")]

    def left(self) -> list[str]:
        """Processes of this command that still run."""
        return [f"{pid}: {_command_line(pid)}" for pid in _marked(self.mark)]

    def assert_nothing_left(self, seconds: float = 15.0) -> None:
        deadline = time.monotonic() + seconds
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert left == []

    def kill_everything(self) -> None:
        """For a test that failed: leave nothing behind."""
        for pid in _marked(self.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def _read_beat(path: Path) -> Rank | None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        memory = mmap.mmap(descriptor, _RECORD.size, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
    with memory:
        while True:
            head, pid, step, phase, *_, tail = _RECORD.unpack_from(memory, 0)
            if head == tail:
                return Rank(pid, step, PHASES[phase]) if pid else None


def _marked(mark: str) -> Iterator[int]:
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes():
                yield int(entry.name)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()[:120].replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
