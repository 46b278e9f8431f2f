"""Who drives a run: a process named so that a reused process id is never mistaken for it."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessIdentity:
    """A process, for ever: its id alone may be given to another one.

    Attributes:
        host: the host name, for people.
        pid: the process id in its namespace.
        space: where `pid` has a meaning: one boot of one machine, one pid namespace.
        started: when it started, in that machine's own ticks (no clock adjustment moves it).
    """

    host: str
    pid: int
    space: str
    started: str

    @classmethod
    def of_this_process(cls) -> ProcessIdentity:
        return cls(socket.gethostname(), os.getpid(), _pid_space(), _start_of(os.getpid()) or "")

    @property
    def is_visible(self) -> bool:
        """True where this process can tell whether that one lives."""
        return self.space == _pid_space()

    @property
    def is_alive(self) -> bool:
        """Whether it still runs. Only to be asked where `is_visible`."""
        return _start_of(self.pid) == self.started


def _pid_space() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    if boot.exists() and namespace.is_symlink():
        return f"{boot.read_text().strip()}/{namespace.readlink()}"
    return socket.gethostname()  # not Linux: host names must do


def _start_of(pid: int) -> str | None:
    """A text that no other process of this id has had; None if there is none, or only a zombie."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            # proc(5): "pid (comm) state ... starttime(22) ..."; comm may hold spaces and parentheses
            fields = stat.read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            return None
        return None if fields[0] in "ZX" else fields[19]
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.0f}"
    except psutil.Error:
        return None
