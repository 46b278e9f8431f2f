"""What is done on a node for the driver: read the ranks' beats, ask them to stop, end them, save their stacks.

On the driver's own node the agent is a plain object in the driver; on every other node it is a small actor with the
same methods (see `swift_dist.cluster.agents`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from swift_dist.cluster.heartbeat import Beat, Listener, process_state

_DUMP_SECONDS = 20.0


class NodeAgent:
    """Looks after the gang's processes on the node it runs on. A process has a name that is never used twice."""

    def __init__(self) -> None:
        self._listeners: dict[str, Listener] = {}

    def offer(self, names: Sequence[str]) -> dict[str, str]:
        """Make a record for each new process; returns where it finds it."""
        self._listeners.update({name: Listener() for name in names})
        return {name: self._listeners[name].path for name in names}

    def read(self) -> dict[str, Beat]:
        """What every process last said, with the kernel's word on its state."""
        return {name: listener.read() for name, listener in self._listeners.items()}

    def request_stop(self, wanted: bool = True) -> None:
        """Ask all processes offered so far to checkpoint and end, or take that back."""
        for listener in self._listeners.values():
            listener.request_stop(wanted)

    def abort(self, wanted: bool = True) -> None:
        """Tell all processes that the attempt has failed (see `worker.StoreServer`), or that a new one begins."""
        for listener in self._listeners.values():
            listener.abort(wanted)

    def forget(self, names: Sequence[str]) -> None:
        """Drop the records of processes that are gone."""
        for name in names:
            listener = self._listeners.pop(name, None)
            if listener is not None:
                listener.close()

    def kill(self, names: Sequence[str]) -> None:
        """SIGKILL, which also ends a stopped process."""
        for name in names:
            pid = self._listeners[name].read().pid if name in self._listeners else 0
            if pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def dump_stacks(self, names: Sequence[str]) -> dict[str, str]:
        """The stacks of all threads of each process, as text; for one that cannot be read, what the kernel says."""
        beats = {name: self._listeners[name].read() for name in names if name in self._listeners}
        return {name: _stacks(beat) for name, beat in beats.items()}


def _stacks(beat: Beat) -> str:
    text = [f"pid {beat.pid}, state {beat.state or 'gone'}, phase {beat.phase}, step {beat.step}, {beat.age:.1f} s\n"]
    if not beat.pid or not beat.state:
        return text[0] + "the process is gone\n"
    spy = Path(sys.executable).with_name("py-spy")
    command = str(spy) if spy.exists() else shutil.which("py-spy")
    dumped = False
    if command:
        # A stopped process cannot be paused and resumed: read its memory as it lies.
        flags = ["--nonblocking"] if beat.state in "Tt" else []
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(
                [command, "dump", "--pid", str(beat.pid), *flags],
                capture_output=True,
                text=True,
                timeout=_DUMP_SECONDS,
                check=False,
            )
            dumped = done.returncode == 0
            text.append(done.stdout if dumped else f"py-spy: {done.stderr.strip()}\n")
    if not dumped and beat.state not in "Tt" and process_state(beat.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(beat.pid, signal.SIGUSR1)
            text.append("faulthandler was asked to write the stacks into the rank's log\n")
    for name in ("status", "wchan", "stack"):
        with contextlib.suppress(OSError):
            text.append(f"--- /proc/{beat.pid}/{name}\n{Path(f'/proc/{beat.pid}/{name}').read_text()}\n")
    return "".join(text)
