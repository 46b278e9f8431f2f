"""The `gang` fixture: real processes, gloo between them, no ports."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Started:
    """A gang that runs."""

    gang: Gang
    pids: list[int]
    folder: Path

    def join(self, seconds: float = 240) -> list[Any]:
        """Each rank's answer: its value, an Exception-like dict {"error", "message"}, or None if it was killed."""
        statuses = self.gang.ask({"wait": self.pids, "seconds": seconds})
        assert None not in statuses, f"ranks did not end:\n{self.output()}"
        self.statuses = statuses
        answers = []
        for rank in range(len(self.pids)):
            path = self.folder / f"result-{rank}.json"
            answer = json.loads(path.read_text()) if path.exists() else None
            answers.append(answer["value"] if answer and "value" in answer else answer)
        return answers

    def output(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("output-*")))


class Gang:
    def __init__(self, folder: Path) -> None:
        self._folder, self._numbers = folder, itertools.count()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("gang_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._process.stdout is not None
        assert json.loads(self._process.stdout.readline()) == {"ready": True}

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, case: str, world: int, **arguments: Any) -> Started:
        folder = self._folder / f"gang-{next(self._numbers)}"
        folder.mkdir()
        request = {"start": case, "world": world, "arguments": arguments, "folder": str(folder)}
        return Started(self, self.ask(json.loads(json.dumps(request, default=str))), folder)

    def run(self, case: str, world: int, **arguments: Any) -> list[Any]:
        """Run to the end; raises AssertionError with the traceback of a rank that failed."""
        started = self.start(case, world, **arguments)
        answers = started.join()
        for answer in answers:
            assert not (isinstance(answer, dict) and "traceback" in answer), answer["traceback"] + started.output()
            assert answer is not None, f"exit statuses {started.statuses}\n{started.output()}"
        return answers

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


@pytest.fixture(scope="session")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gang]:
    gang = Gang(tmp_path_factory.mktemp("gangs"))
    yield gang
    gang.close()
