"""HAProxy's tables, changed while it runs, through its administration socket."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from swift_dist.errors import RunError
from swift_dist.serving.front.config import ADMIN_SOCKET, MODELS, SERVERS, SHARES
from swift_dist.serving.front.tables import Server, Tables, first_number

_SECONDS = 10.0


def connect(folder: Path, name: str) -> socket.socket:
    """A connection to a socket in `folder`, however long that path is (the kernel's limit is 107 bytes).

    Raises:
        OSError: nobody listens.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(_SECONDS)
    directory = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        connection.connect(f"/proc/self/fd/{directory}/{name}")
    except BaseException:
        connection.close()
        raise
    finally:
        os.close(directory)
    return connection


def ask(folder: Path, command: str) -> str:
    """HAProxy's answer to one command.

    Raises:
        OSError: it does not run, or does not answer.
    """
    with connect(folder, ADMIN_SOCKET) as connection:
        connection.sendall(command.encode() + b"\n")
        answer = b""
        while received := connection.recv(1 << 16):
            answer += received
    return answer.decode().strip()


@dataclass(frozen=True)
class Use:
    """Requests of one slot: that run, and that wait for a place."""

    running: int
    waiting: int


def use(folder: Path) -> dict[str, Use]:
    """What each slot is doing."""
    lines = ask(folder, "show stat -1 2 -1").splitlines()
    columns = lines[0].lstrip("# ").split(",")
    name, waiting, running = (columns.index(column) for column in ("pxname", "qcur", "scur"))
    rows = [line.split(",") for line in lines[1:] if line]
    # A backend's scur counts those that wait, too.
    return {
        row[name]: Use(int(row[running]) - int(row[waiting]), int(row[waiting]))
        for row in rows
        if re.fullmatch(r"v\d+", row[name])
    }


@dataclass(frozen=True)
class Found:
    """A server as HAProxy has it. `ready`: not in maintenance."""

    address: str
    port: int
    ready: bool


def servers(folder: Path) -> dict[str, dict[str, Found]]:
    """The servers of each backend that has any."""
    lines = ask(folder, "show servers state").splitlines()
    columns = lines[1].lstrip("# ").split()
    be, name, address, port, admin = (
        columns.index(c) for c in ("be_name", "srv_name", "srv_addr", "srv_port", "srv_admin_state")
    )
    found: dict[str, dict[str, Found]] = {}
    for row in (line.split() for line in lines[2:] if line):
        found.setdefault(row[be], {})[row[name]] = Found(row[address], int(row[port]), int(row[admin]) & 0x01 == 0)
    return found


class Runtime:
    """Brings a running HAProxy to hold given tables.

    Args:
        folder: that it was started in.
        words: a server of a version -> the words that define it.
    """

    def __init__(self, folder: Path, words: Callable[[Server], str]) -> None:
        self.folder, self.words = folder, words

    def apply(self, tables: Tables) -> None:
        """Have the tables in force. No request is cut: servers that are to go get no new ones.

        Servers come first and go last, and what requests draw from is replaced at once, so that each request sees
        either the old routing or the new one.

        Raises:
            RunError: HAProxy refused, or holds something else afterwards.
        """
        found = servers(self.folder)
        self._labels(tables.labels)
        for slot, wanted in tables.slots.items():
            for name, server in wanted.items():
                self._add(f"{slot}/{name}", server, found.get(slot, {}).get(name))
        # Numbers of routes are never used again: the old models' draws stay valid until the new models are there.
        current = set(self._map(MODELS).values())
        kept = {key: slot for key, slot in self._map(SHARES).items() if first_number(key) in current}
        self._replace(SHARES, kept | tables.shares)
        self._replace(MODELS, tables.models)
        for slot, present in found.items():
            if slot in tables.slots:
                self._retire(slot, present, tables.slots[slot])
        self._verify(tables)

    def move_control(self, host: str, port: int) -> None:
        """Have the control API at another address."""
        self._do(f"set server control/control addr {host} port {port}", allowed=r"(?s).*(changed|no need|nothing).*")

    def clear(self, current: set[str]) -> list[str]:
        """Delete servers that were told to go and on which nothing runs any more.

        Args:
            current: slots that requests are sent to. Others are emptied once nothing runs there.

        Returns:
            The slots that are empty and not current.
        """
        busy = use(self.folder)
        empty = []
        for slot, present in servers(self.folder).items():
            if slot not in busy:
                continue
            idle = slot not in current and busy[slot] == Use(0, 0)
            left = {name for name, server in present.items() if not (self._delete(slot, name, server, idle))}
            if idle and not left:
                empty.append(slot)
        return empty

    def _delete(self, slot: str, name: str, server: Found, idle: bool) -> bool:
        if server.ready and not idle:
            return False
        if server.ready:
            self._do(f"set server {slot}/{name} state maint")
        return "deleted" in ask(self.folder, f"del server {slot}/{name}")  # refused while a request runs there

    def _labels(self, labels: dict[str, str]) -> None:
        known = self._map(SERVERS)
        for name, label in labels.items():
            if name not in known:
                self._do(f"add map {SERVERS} {name} {label}")

    def _add(self, path: str, server: Server, found: Found | None) -> None:
        if found is None:
            self._do(f"add server {path} {self.words(server)}", allowed=r"New server registered\.")
            self._do(f"enable server {path}; enable health {path}")
        elif not found.ready:
            self._do(f"set server {path} state ready")

    def _retire(self, slot: str, present: Iterable[str], wanted: dict[str, Server]) -> None:
        for name in present:
            if name not in wanted:
                self._do(f"set server {slot}/{name} state maint")
        if all(server.spare for server in wanted.values()):
            # Requests that wait in the slot are taken up when a server becomes ready, not when it is there already.
            for name in wanted:
                self._do(f"set server {slot}/{name} state maint; set server {slot}/{name} state ready")

    def _map(self, name: str) -> dict[str, str]:
        lines = ask(self.folder, f"show map {name}").splitlines()
        return dict(line.split(" ", 2)[1:] for line in lines if line)

    def _replace(self, name: str, entries: dict[str, str]) -> None:
        answer = self._do(f"prepare map {name}", allowed=r"New version created: \d+")
        version = answer.rsplit(" ", 1)[1]
        for key, value in entries.items():
            self._do(f"add map @{version} {name} {key} {value}")
        self._do(f"commit map @{version} {name}")

    def _do(self, command: str, allowed: str = "") -> str:
        try:
            answer = ask(self.folder, command)
        except OSError as error:
            raise RunError(f"HAProxy does not answer: {error}") from error
        if not re.fullmatch(allowed, answer):
            raise RunError(f"HAProxy refused `{command}`: {answer}")
        return answer

    def _verify(self, tables: Tables) -> None:
        found = servers(self.folder)
        ready = {slot: {n for n, s in found.get(slot, {}).items() if s.ready} for slot in tables.slots}
        if ready != {slot: set(wanted) for slot, wanted in tables.slots.items()} or self._map(MODELS) != tables.models:
            raise RunError(f"HAProxy holds other tables than it was given: {ready}")
