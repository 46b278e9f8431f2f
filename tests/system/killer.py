"""Kills ranks of a running command at chosen kinds of moments, with chance inside each kind."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from commands import Command, Rank


@dataclass
class Killer:
    """Sends signals to ranks of `command`, whose run folder is `run_dir`; all chances come from `seed`.

    Attributes:
        hits: what was killed when, for the report of a failed test (pytest shows what is printed).
    """

    command: Command
    run_dir: Path
    seed: int
    hits: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._began = time.monotonic()
        print(f"seed {self.seed}")

    def start_up(self, phase: str) -> None:
        """Somewhere before the attempt's first step."""
        self._strike(
            f"start-up ({phase})", lambda rank: rank.phase == phase, self._chance.uniform(0.0, 0.5), pause=0.02
        )

    def step(self, first: int, last: int) -> None:
        """While the gang is in one of these steps."""
        wanted = self._chance.randint(first, last)
        self._strike(f"step {wanted}", lambda rank: rank.step >= wanted and rank.phase == "step", self._a_while(), 0.01)

    def writing(self) -> None:
        """While some checkpoint is being written."""
        self._strike("writing a checkpoint", lambda rank: bool(self._half_written()), 0.0)

    def final_save(self, steps: int) -> None:
        """While the last checkpoint is being written.

        There is one such moment, and it is short: near the end one rank, without which none ends, is let go for two
        milliseconds at a time.
        """
        what = "the final save"
        self.command.until(lambda: any(r.step >= steps - 3 for r in self.command.ranks()), "the last steps", pause=0.01)
        pid = self._chance.choice(self.command.ranks()).pid
        while not self._half_written(f"step_{steps}."):
            assert self.command.process.poll() is None, f"ended before {what}: {self.hits}\n{self.command.stderr}"
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.002)
            os.kill(pid, signal.SIGSTOP)
        self._kill(pid, what)

    def any_moment(self, seconds: float) -> None:
        """At a random time from now."""
        self._strike("any moment", lambda rank: True, self._chance.uniform(0.0, seconds))

    def _a_while(self) -> float:
        return self._chance.uniform(0.0, 0.1)

    def _half_written(self, prefix: str = "step_") -> list[Path]:
        return list((self.run_dir / "checkpoints").glob(f"{prefix}*tmp-*"))

    def _strike(self, what: str, suits: Callable[[Rank], bool], delay: float, pause: float = 0.002) -> None:
        """SIGKILL one rank at a moment that suits, `delay` seconds after such a moment was first seen.

        To look (every `pause` seconds) takes computing time from the ranks: often only for what is short.

        It is stopped, looked at again, and only then killed (or let go): so the moment is what it says.
        """
        self.command.until(lambda: any(suits(r) for r in self.command.ranks()), what, pause=pause)
        time.sleep(delay)
        while True:
            assert self.command.process.poll() is None, f"ended before {what}: {self.hits}\n{self.command.stderr}"
            ranks = [rank for rank in self.command.ranks() if suits(rank)]
            if not ranks:
                time.sleep(pause)
                continue
            pid = self._chance.choice(ranks).pid
            os.kill(pid, signal.SIGSTOP)
            now = next((rank for rank in self.command.ranks() if rank.pid == pid), None)
            if now is not None and suits(now):
                break
            os.kill(pid, signal.SIGCONT)
        self._kill(pid, what)

    def _kill(self, pid: int, what: str) -> None:
        """A rank that stands stopped."""
        rank = next(rank for rank in self.command.ranks() if rank.pid == pid)
        os.kill(pid, signal.SIGKILL)
        seen = f"{time.monotonic() - self._began:6.2f} s: {what}; process {pid}, step {rank.step}, phase {rank.phase}"
        self.hits.append(seen)
        print(seen)
        self.command.until(lambda: all(r.pid != pid for r in self.command.ranks()), "the death of a killed rank")
