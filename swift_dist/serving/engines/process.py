"""One engine's server process: started, watched, asked, stopped. Nothing of it outlives the process that owns it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from swift_dist.errors import RunError
from swift_dist.serving.engines.base import Engine, Load, engine_variables
from swift_dist.serving.options import ServedModel

_POLL_SECONDS = 0.2
_TAIL_LINES = 25
# What bindings of C++ print at the end of any process, hiding why it ended.
_NOISE = re.compile(
    r"nanobind: |See https://nanobind| - (leaked|\.\.\. skipped)|.*resource_tracker|\s*warnings\.warn|\s*$"
)


class EngineProcess:
    """A server of `engine` for `served`. Its methods may be called from any thread.

    Args:
        engine: which one.
        served: the model.
        host: address to listen on.
        log: file that the server's output is appended to.

    Attributes:
        port: it listens there, once started.
    """

    def __init__(self, engine: Engine, served: ServedModel, host: str = "127.0.0.1", *, log: Path) -> None:
        self.engine, self.served, self.host, self.log = engine, served, host, Path(log)
        self.port = 0
        self._guard: subprocess.Popen[bytes] | None = None
        self._reserved: socket.socket | None = None
        self._log_start = 0

    def start(self, port: int | None = None) -> EngineProcess:
        """Start the server; it is not ready yet.

        Args:
            port: to listen on (default: a free one). Until the server is ready the port is held by a socket that is
                bound and does not listen: the kernel gives it to nobody else, and a server may still bind it.

        Raises:
            RunError: the port is taken, or the engine's environment cannot be made.
        """
        if self.alive:
            raise RuntimeError("started already")
        self.engine.prepare()
        self._reserved = _reserve(self.host, port or 0)
        self.port = self._reserved.getsockname()[1]
        command = self.engine.command(self.served, self.host, self.port)
        variables = {**os.environ, **engine_variables(self.served), **self.engine.environment(self.served)}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._log_start = output.tell()
            self._guard = subprocess.Popen(
                [sys.executable, "-P", "-m", "swift_dist.serving.engines._guard", str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=variables,
                start_new_session=True,  # Ctrl-C is the owner's to act on
            )
        return self

    def wait_ready(self) -> EngineProcess:
        """Wait until requests are served.

        Raises:
            RunError: the server ended, with the last lines of its log; or it took longer than `Engine.start_seconds`,
                and was stopped.
        """
        deadline = time.monotonic() + self.engine.start_seconds
        while not self.healthy():
            if not self.alive:
                raise RunError(f"{self._name} ended while it started ({self.exit_code}).{self._tail()}", "")
            if time.monotonic() > deadline:
                self.stop(grace=0)
                raise RunError(f"{self._name} was not ready after {self.engine.start_seconds:.0f} s.{self._tail()}", "")
            time.sleep(_POLL_SECONDS)
        self._release()
        return self

    @property
    def url(self) -> str:
        """What paths such as ``/v1/chat/completions`` are appended to."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def pid(self) -> int | None:
        """Of the process above the engine's whole tree; None before the start."""
        return self._guard.pid if self._guard else None

    @property
    def alive(self) -> bool:
        """Whether the process runs; it may not be ready, or may no longer answer."""
        return self._guard is not None and self._guard.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Of the server (128 + the signal's number where one ended it); None while it runs."""
        return self._guard.poll() if self._guard else None

    def healthy(self, timeout: float = 2.0) -> bool:
        """Whether it answers that it serves requests, within `timeout` seconds."""
        try:
            return self.alive and self._request("GET", self.engine.health_path, timeout)[0] == 200
        except OSError:
            return False

    def load(self, timeout: float = 5.0) -> Load:
        """What it is doing now.

        Raises:
            RunError: it does not say so within `timeout` seconds.
        """
        return self.engine.load(self._ask("GET", "/metrics", timeout))

    def load_adapter(self, name: str, path: str | Path, timeout: float = 120.0) -> None:
        """Serve the PEFT folder `path` as model `name`, from when this returns.

        Raises:
            JobError: the engine cannot apply it.
            RunError: the server refused, with its words.
        """
        where, body = self.engine.adapter_request(name, str(path))
        self._ask("POST", where, timeout, body)

    def unload_adapter(self, name: str, timeout: float = 120.0) -> None:
        """Serve adapter `name` no longer.

        Raises:
            RunError: the engine refused, with its words.
        """
        where, body = self.engine.adapter_request(name, None)
        self._ask("POST", where, timeout, body)

    def stop(self, grace: float = 10.0) -> None:
        """End it, whatever state it is in: SIGTERM, and after `grace` seconds SIGKILL for the whole tree."""
        guard = self._guard
        self._release()
        if guard is None:
            return
        for number, patience in ((signal.SIGTERM, grace), (signal.SIGQUIT, 15.0), (signal.SIGKILL, None)):
            if patience != 0:
                guard.send_signal(number)
                try:
                    guard.wait(patience)
                    return
                except subprocess.TimeoutExpired:
                    continue

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def _name(self) -> str:
        return f"The server of {self.engine.name} for {self.served.name!r}"

    def _ask(self, method: str, path: str, timeout: float, body: dict[str, Any] | None = None) -> str:
        try:
            status, text = self._request(method, path, timeout, body)
        except OSError as error:
            raise RunError(f"{self._name} did not answer {path}: {type(error).__name__}: {error}", "") from error
        if status != 200:
            raise RunError(f"{self._name} refused {path}: {message_of(text)}", "")
        return text

    def _request(self, method: str, path: str, timeout: float, body: dict[str, Any] | None = None) -> tuple[int, str]:
        """Status and text. http.client, because a proxy in the environment is not for a process of ours."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            content = None if body is None else json.dumps(body).encode()
            connection.request(method, path, content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        except http.client.HTTPException as error:  # such as an answer cut short by the server's end
            raise ConnectionError(repr(error)) from error
        finally:
            connection.close()

    def _tail(self) -> str:
        with self.log.open("rb") as stream:
            stream.seek(self._log_start)
            lines = stream.read().decode(errors="replace").splitlines()
        last = [line for line in lines if not _NOISE.match(line)][-_TAIL_LINES:]
        return f" Its log ({self.log}) ends with:\n  " + "\n  ".join(last) if last else f" Its log is {self.log}."

    def _release(self) -> None:
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None


def _reserve(host: str, port: int) -> socket.socket:
    """A socket bound to `port` (0: a free one) that does not listen."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    reserved = socket.socket(family, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as every server sets it, else none could bind it
    try:
        reserved.bind((host, port))
    except OSError as error:
        reserved.close()
        raise RunError(f"{host}:{port} cannot be listened on: {error.strerror}", "Choose another port.") from error
    return reserved


def message_of(text: str) -> str:
    """What an error body says: OpenAI's shape, or whatever else it is."""
    try:
        body = json.loads(text)
    except ValueError:
        return text[:500]
    said = body.get("error", body) if isinstance(body, dict) else body
    return str(said.get("message", said) if isinstance(said, dict) else said)
