"""Functions run by processes that are forked from this one, which has imported all they need: no start takes seconds.

The process that forks must have computed nothing with torch: OpenMP's threads do not survive a fork, and a child that
wants them may hang.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from swift_dist.errors import JobError, RunError
from swift_dist.lifetime import end_with_parent


class Processes:
    """Functions in forked processes, which end with this object, or with this process however it ends.

    A process that has answered stays until all have: closing its sockets could cost a peer its last message.

    Args:
        calls: function and arguments of each; what it returns must be JSON.
        folder: an absent or empty folder for their answers.
        timeout: seconds from now for all answers.
    """

    def __init__(self, calls: list[tuple[Any, dict[str, Any]]], folder: Path, timeout: float) -> None:
        folder.mkdir(exist_ok=True)
        self._files = [folder / f"answer-{number}.json" for number in range(len(calls))]
        self._timeout, self._end = timeout, time.monotonic() + timeout
        self._pids: list[int | None] = []
        threads = max(_num_cpus() // len(calls), 1)
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        for (function, arguments), file in zip(calls, self._files, strict=True):
            pid = os.fork()
            if pid == 0:
                _be_a_child(parent, threads, file, function, arguments)
            self._pids.append(pid)

    def answers(self, what: str) -> list[Any]:
        """What the functions returned. `what` names them in errors.

        Raises:
            RunError: one of them raised (the first that did), died, or the time is over.
        """
        while True:
            dead = self._dead()  # before looking at the answers: one may answer and end in between
            found = {n: json.loads(file.read_text()) for n, file in enumerate(self._files) if file.exists()}
            errors = [answer for answer in found.values() if "error" in answer]
            if errors:  # a peer that misses it says so later
                raise RunError(f"{what}: {min(errors, key=lambda answer: answer['time'])['error']}")
            if len(found) == len(self._files):
                return [found[number]["value"] for number in range(len(found))]
            for number, status in dead.items():
                if number not in found:
                    raise RunError(f"{what}: process {number} of {len(self._files)} ended without an answer ({status})")
            if time.monotonic() > self._end:
                late = [str(number) for number in range(len(self._files)) if number not in found]
                raise RunError(f"{what}: no answer from process {', '.join(late)} within {self._timeout:g} s")
            time.sleep(0.01)

    def _dead(self) -> dict[int, str]:
        dead = {}
        for number, pid in enumerate(self._pids):
            if pid is not None and (found := os.waitpid(pid, os.WNOHANG))[0]:
                self._pids[number] = None
                code = os.waitstatus_to_exitcode(found[1])
                dead[number] = f"signal {-code}: out of memory?" if code == -signal.SIGKILL else f"exit code {code}"
        return dead

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        for number, pid in enumerate(self._pids):
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                self._pids[number] = None


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _be_a_child(parent: int, threads: int, file: Path, function: Any, arguments: dict[str, Any]) -> NoReturn:
    """Call the function, leave its answer, and wait to be killed."""
    try:
        end_with_parent(parent=parent)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent acts on Ctrl-C
        import torch

        torch.set_num_threads(threads)
        answer = {"value": function(**arguments)}
    except BaseException as error:
        name = ""
        if not isinstance(error, (JobError, RunError)):  # those say what they mean
            traceback.print_exc()
            name = f"{type(error).__name__}: "
        answer = {"error": f"{name}{error}", "time": time.time()}
    try:
        sys.stderr.flush()
        temporary = file.with_suffix(".new")
        temporary.write_text(json.dumps(answer))
        temporary.rename(file)
        while os.getppid() == parent:
            time.sleep(1)
    finally:
        os._exit(0)
