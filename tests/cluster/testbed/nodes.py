"""Simulated nodes on one Linux machine: a namespace of every kind that matters, joined by a bridge.

Each node has its own address, host name, process table, /dev/shm, /tmp/ray and semaphores; they share the file system,
as the nodes of a cluster share theirs. Nothing is set up outside: the bridge lies in a namespace of its own, and all of
it hangs on processes that the kernel ends with the one that made them. Needs root.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

_PR_SET_PDEATHSIG = 1
_SUBNET = "10.66.0."
_NAMESPACES = ("--net", "--uts", "--ipc", "--mount", "--pid")
_BOOT = """
set -e; folder=$1; name=$2
hostname "$name"
mount --bind "$folder/hosts" /etc/hosts
mount --bind "$folder/resolv.conf" /etc/resolv.conf
mount -t tmpfs -o size=2g tmpfs /dev/shm
mkdir -p /tmp/ray; mount --bind "$folder/ray" /tmp/ray
ip link set lo up
exec "$3" -IS -c "$4" "$folder/up"
"""
# Process 1 of a node. Orphans fall back to it, and as it ignores SIGCHLD the kernel reaps them.
_INIT = """
import signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
open(sys.argv[1], "w").close()
while True:
    signal.pause()
"""


def missing() -> str | None:
    """Why there can be no simulated nodes here; None: there can."""
    if os.geteuid() != 0:
        return "simulated nodes need root"
    programs = [name for name in ("ip", "unshare", "nsenter", "mount") if shutil.which(name) is None]
    if programs:
        return f"simulated nodes need {', '.join(programs)} (apt-get install iproute2 util-linux)"
    if subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], capture_output=True, check=False).returncode:
        return "this machine's kernel or container allows no namespaces"
    return None


class Node:
    """One simulated node.

    Attributes:
        name: its host name.
        address: its IPv4 address.
        folder: its private files; `ray` in it is its /tmp/ray.
    """

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address, self.folder = name, address, folder
        self._keeper: subprocess.Popen[bytes] | None = None
        self.pid = 0

    def boot(self) -> None:
        """Start process 1 and wait until it stands."""
        (self.folder / "ray").mkdir(parents=True)
        # Without a name server that refuses at once, a reverse look-up takes 10 s.
        (self.folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        self._keeper = subprocess.Popen(
            [
                *("unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc"),
                *("sh", "-c", _BOOT, "_", str(self.folder), self.name, sys.executable, _INIT),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # unshare complains when its child is killed
            preexec_fn=_end_with_parent,
        )
        _until((self.folder / "up").exists, f"node {self.name}")
        self.pid = _only_child(self._keeper.pid)

    def start(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        *,
        cwd: Path | None = None,
        output: IO[Any] | int | None = None,
        errors: IO[Any] | int | None = subprocess.STDOUT,
    ) -> subprocess.Popen[bytes]:
        """Run a command on the node. Its process here is nsenter's: see `inner`."""
        script = 'cd "$1" && shift && exec "$@"'
        return subprocess.Popen(
            [
                *("nsenter", "--target", str(self.pid), *_NAMESPACES),
                *("sh", "-c", script, "_", str(cwd or self.folder), *command),
            ],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output if output is not None else subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )

    def processes(self) -> dict[int, str]:
        """Every process on the node, by its id as seen from outside, with its command line; without process 1."""
        if self._keeper is None:
            return {}
        here = Path(f"/proc/{self.pid}/ns/pid").stat().st_ino
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and int(entry.name) != self.pid and (entry / "ns/pid").stat().st_ino == here:
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        return {pid: line for pid, line in found.items() if line}  # a zombie has none

    def set_link(self, up: bool) -> None:
        """Plug its network cable in or pull it."""
        _run("nsenter", "--target", str(self.pid), "--net", "ip", "link", "set", "eth0", "up" if up else "down")

    def end(self) -> None:
        """Power off: the kernel kills whatever runs there."""
        if self._keeper is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid or self._keeper.pid, signal.SIGKILL)
            self._keeper.wait()
            self._keeper = None


class Network:
    """Nodes on one bridge, by their names. A context manager: leaving it leaves nothing behind, nor its `folder`."""

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self.nodes = [Node(name, f"{_SUBNET}{10 + i}", folder / name) for i, name in enumerate(names, 1)]
        self._switch: subprocess.Popen[bytes] | None = None
        self.folder = folder

    def __enter__(self) -> Network:
        try:
            self._set_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _set_up(self) -> None:
        self._switch = subprocess.Popen(
            ["unshare", "--net", "sleep", "infinity"], stdin=subprocess.DEVNULL, preexec_fn=_end_with_parent
        )
        switch = str(self._switch.pid)
        own = Path("/proc/self/ns/net").stat().st_ino
        _until(lambda: Path(f"/proc/{switch}/ns/net").stat().st_ino != own, "the bridge's namespace")
        in_switch = ("nsenter", "--target", switch, "--net", "ip")
        _run(*in_switch, "link", "add", "bridge0", "type", "bridge")
        _run(*in_switch, "link", "set", "bridge0", "up")
        hosts = "127.0.0.1 localhost\n" + "".join(f"{node.address} {node.name}\n" for node in self.nodes)
        for node in self.nodes:
            node.folder.mkdir(parents=True)
            (node.folder / "hosts").write_text(hosts)
            node.boot()
            port = f"port-{node.name}"
            in_node = ("nsenter", "--target", str(node.pid), "--net", "ip")
            _run(*in_switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(node.pid))
            _run(*in_switch, "link", "set", port, "master", "bridge0", "up")
            _run(*in_node, "addr", "add", f"{node.address}/24", "dev", "eth0")
            _run(*in_node, "link", "set", "eth0", "up")

    def __exit__(self, *exc_info: object) -> None:
        for node in self.nodes:
            node.end()
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()
            self._switch = None
        shutil.rmtree(self.folder, ignore_errors=True)


def inner(process: subprocess.Popen[bytes]) -> int:
    """The id, here, of the process that `Node.start` started: nsenter waits for it as its only child.

    (nsenter does not pass signals on; and killed, it leaves the process behind.)
    """
    return _only_child(process.pid)


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Leaves nothing of a process that `Node.start` started."""
    try:
        yield process
    finally:
        if process.poll() is None:
            with contextlib.suppress(AssertionError, ProcessLookupError):
                os.kill(inner(process), signal.SIGKILL)
            process.kill()
        process.wait()


def _only_child(parent: int) -> int:
    path = Path(f"/proc/{parent}/task/{parent}/children")
    return int(_until(lambda: path.read_text().split(), f"a child of process {parent}")[0])


def _until(condition: Callable[[], Any], what: str, seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"
        time.sleep(0.01)
    return value


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
