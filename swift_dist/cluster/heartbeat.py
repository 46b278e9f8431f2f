"""Where a rank is, told without a call: a record in shared memory that the rank writes and its node's agent reads.

The agent makes an anonymous memory file for every process, which maps it through ``/proc/<agent>/fd/<n>``: nothing is
left on any disk however either of them ends. A beat costs a few microseconds; neither side ever waits.
"""

from __future__ import annotations

import mmap
import os
import statistics
import struct
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

PHASES = ("idle", "import", "build", "load", "step", "eval", "save", "final", "ended")
"""In the order in which a rank goes through them within one step; see `swift_dist.runs.worker.Worker.beat`."""

_RECORD = struct.Struct("<QqqqddQ")  # version, pid, step, phase, time of the beat, median step seconds, version
_STOP, _ABORT = 128, 129  # bytes that the agent alone writes, in a cache line of their own
_SIZE = 4096


@dataclass(frozen=True)
class Beat:
    """What one process last said.

    Attributes:
        pid: its process id on its node; 0 before it has spoken.
        step: the step it is in (steps done so far).
        phase: one of `PHASES`.
        age: seconds since it entered that phase of that step.
        median_step: median seconds of the attempt's recent steps, the first one left out; None until known.
        state: the kernel's letter for the process (R, S, D, T stopped, Z, ...); "" when it is gone.
    """

    pid: int = 0
    step: int = 0
    phase: str = "idle"
    age: float = 0.0
    median_step: float | None = None
    state: str = ""


class Pulse:
    """The rank's side of the record."""

    def __init__(self, path: str) -> None:
        """Map the record that the agent offers at `path`."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._memory = mmap.mmap(descriptor, _SIZE)
        finally:
            os.close(descriptor)
        self._version = 0
        self._durations: deque[float] = deque(maxlen=64)
        self._step_began: float | None = None
        self._steps_seen = 0

    def start_attempt(self) -> None:
        """Forget the step times of the attempt before."""
        self._durations.clear()
        self._step_began, self._steps_seen = None, 0

    def beat(self, phase: str, step: int) -> None:
        """Record the phase and step that begin now."""
        now = time.monotonic()
        if self._step_began is not None:
            self._steps_seen += 1
            if self._steps_seen > 1:  # the first step of an attempt compiles, allocates and connects
                self._durations.append(now - self._step_began)
        self._step_began = now if phase == "step" else None
        median = statistics.median(self._durations) if self._durations else 0.0
        self._version += 2
        # A reader that meets a half-written record sees two different versions and looks again.
        _RECORD.pack_into(
            self._memory, 0, self._version, os.getpid(), step, PHASES.index(phase), now, median, self._version
        )

    def stop_requested(self) -> bool:
        """True once the agent was told to ask for a stop. One byte read."""
        return self._memory[_STOP] != 0

    def aborted(self) -> bool:
        """True once a rank of this attempt has failed, so that nobody needs to wait for it."""
        return self._memory[_ABORT] != 0


class Listener:
    """The agent's side: one record per process."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("swift_dist-beat", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, _SIZE)
        self._memory = mmap.mmap(self._descriptor, _SIZE)

    @property
    def path(self) -> str:
        """Where a process on the same node, of the same user, opens the record."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def read(self) -> Beat:
        while True:
            head, pid, step, phase, at, median, tail = _RECORD.unpack_from(self._memory, 0)
            if head == tail:
                break
        if not pid:
            return Beat()
        return Beat(pid, step, PHASES[phase], time.monotonic() - at, median or None, process_state(pid))

    def request_stop(self, wanted: bool = True) -> None:
        self._memory[_STOP] = int(wanted)

    def abort(self, wanted: bool = True) -> None:
        self._memory[_ABORT] = int(wanted)

    def close(self) -> None:
        self._memory.close()
        os.close(self._descriptor)


def process_state(pid: int) -> str:
    """The kernel's letter for a process, or "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
