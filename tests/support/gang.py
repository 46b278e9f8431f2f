"""Ranks for tests: functions run as gangs of plain processes, forked from one warm process (`forked_ranks.py`)."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


class Gang:
    """Runs ``function(worker, **arguments)`` of a file on some number of ranks. Arguments must be JSON.

    Args:
        imports: further modules that the process imports before any rank is forked.
    """

    def __init__(self, imports: tuple[str, ...] = ()) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py")), *imports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._folders = tempfile.TemporaryDirectory()
        self._count = 0

    def run(self, file: str | Path, function: str, world: int, seconds: float = 120, **arguments: Any) -> list[Any]:
        """The return values of all ranks, by rank. Raises the first rank's error, with its traceback as a note."""
        return self.start(file, function, world, **arguments).results(seconds)

    def start(self, file: str | Path, function: str, world: int, **arguments: Any) -> Case:
        self._count += 1
        folder = Path(self._folders.name) / str(self._count)
        folder.mkdir()
        request = {"file": str(file), "function": function, "world": world, "folder": str(folder)}
        return Case(self, self.ask({"start": {**request, "arguments": arguments}}), folder)

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=60)
        self._folders.cleanup()


class Case:
    """One function running on its ranks."""

    def __init__(self, gang: Gang, pids: list[int], folder: Path) -> None:
        self.gang, self.pids, self.folder = gang, pids, folder

    def results(self, seconds: float = 120) -> list[Any]:
        """Values by rank; None for a rank that was killed. Raises what a rank raised, or TimeoutError."""
        statuses = self.gang.ask({"wait": self.pids, "seconds": seconds})
        answers = [self._answer(rank) for rank in range(len(self.pids))]
        for rank, answer in enumerate(answers):
            if answer and "error" in answer:
                answer["error"].add_note(f"rank {rank}:\n{answer['traceback']}")
                raise answer["error"]
        if None in statuses:
            raise TimeoutError(f"ranks {[r for r, s in enumerate(statuses) if s is None]} did not end: {self.folder}")
        return [answer and answer["value"] for answer in answers]

    def _answer(self, rank: int) -> dict[str, Any] | None:
        path = self.folder / f"result-{rank}.pickle"
        return pickle.loads(path.read_bytes()) if path.exists() else None
