"""HAProxy's tables, changed while it runs, through its administration socket."""

from __future__ import annotations

import csv
import os
import re
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from urllib.parse import unquote

from swift_dist.errors import RunError
from swift_dist.serving.front.config import ADMIN_SOCKET, METRICS_SOCKET, MODELS, SERVERS, SHARES
from swift_dist.serving.front.tables import Server, Tables, first_number

_SECONDS = 10.0
_UNREACHABLE_SECONDS = 6  # longer than keepalive takes; that a server is down is found 2 to 4 seconds after it went
_BACKENDS, _SERVERS = 2, 4  # kinds of lines of `show stat`
_SLOT = re.compile(r"v\d+")


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


def ask(folder: Path, *commands: str) -> list[str]:
    """HAProxy's answers to commands, which are sent at once and executed in turn.

    Raises:
        OSError: it does not run, or does not answer.
    """
    with connect(folder, ADMIN_SOCKET) as connection:
        # After `prompt` each answer is followed by one.
        connection.sendall("\n".join(["prompt", *commands, "quit", ""]).encode())
        received = b""
        while more := connection.recv(1 << 16):
            received += more
    answers = received.decode().split("\n> ")
    if len(answers) != len(commands) + 2:
        raise ConnectionError(f"{len(answers) - 2} answers to {len(commands)} commands")
    return [answer.strip() for answer in answers[1:-1]]


@dataclass(frozen=True)
class Use:
    """Requests of one slot: that run, and that wait for a place."""

    running: int
    waiting: int


def use(folder: Path) -> dict[str, Use]:
    """What each slot is doing."""
    # A backend's scur counts those that wait, too.
    return {
        row["pxname"]: Use(int(row["scur"]) - int(row["qcur"]), int(row["qcur"]))
        for row in _statistics(folder, _BACKENDS)
        if _SLOT.fullmatch(row["pxname"])
    }


def unreachable(folder: Path, seconds: int) -> list[str]:
    """Servers (``slot/name``) whose node has answered nothing for that long since they were found to be down.

    One that refuses connections is not among them: its kernel is there, and ends those connections that are over. One
    that hangs looks like a vanished node only once its queue of new connections is full (uvicorn's has 2,048).
    """
    return [
        f"{row['pxname']}/{row['svname']}"
        for row in _statistics(folder, _SERVERS)
        if _SLOT.fullmatch(row["pxname"])
        and row["status"] == "DOWN"
        and int(row["lastchg"]) >= seconds
        and (row["check_status"].endswith("L4TOUT") or row["last_chk"] == "No route to host")
    ]


def _statistics(folder: Path, kind: int) -> Iterable[dict[str, str]]:
    """The lines of ``show stat`` (HAProxy's management guide, 9.1)."""
    return csv.DictReader(ask(folder, f"show stat -1 {kind} -1")[0].removeprefix("# ").splitlines())


def metrics(folder: Path) -> str:
    """HAProxy's metrics in Prometheus' text format, and which replica each of its servers is.

    The samples of slots that have no server are left out.

    Raises:
        OSError: it does not run.
    """
    with connect(folder, METRICS_SOCKET) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: front\r\nConnection: close\r\n\r\n")
        answer = HTTPResponse(connection)
        answer.begin()
        lines = answer.read().decode().splitlines()
    used = {match[1] for line in lines if (match := _SAMPLE_OF_SERVER.match(line))}
    kept = [line for line in lines if not (match := _SAMPLE_OF_SLOT.match(line)) or match[1] in used]
    info = "swift_dist:front_server_info"
    kept += [f"# HELP {info} Which replica a server of HAProxy's is.", f"# TYPE {info} gauge"]
    for server, label in _map(ask(folder, f"show map {SERVERS}")[0]).items():
        version, replica = (unquote(word) for word in label.split("|"))
        kept.append(f'{info}{{server="{server}",version="{version}",replica="{replica}"}} 1')
    return "\n".join([*kept, ""])


_SAMPLE_OF_SERVER = re.compile(r'haproxy_server_status\{proxy="(v\d+)"')
_SAMPLE_OF_SLOT = re.compile(r'haproxy_\w+\{proxy="(v\d+)"')


@dataclass(frozen=True)
class Found:
    """A server as HAProxy has it. `ready`: not in maintenance."""

    address: str
    port: int
    ready: bool


def _servers(answer: str) -> dict[str, dict[str, Found]]:
    """The servers of each backend that has any, from ``show servers state``."""
    lines = answer.splitlines()
    columns = lines[1].lstrip("# ").split()
    be, name, address, port, admin = (
        columns.index(c) for c in ("be_name", "srv_name", "srv_addr", "srv_port", "srv_admin_state")
    )
    found: dict[str, dict[str, Found]] = {}
    for row in (line.split() for line in lines[2:] if line):
        found.setdefault(row[be], {})[row[name]] = Found(row[address], int(row[port]), int(row[admin]) & 0x01 == 0)
    return found


def _map(answer: str) -> dict[str, str]:
    """A map's entries, from ``show map``."""
    return dict(line.split(" ", 2)[1:] for line in answer.splitlines() if line)


class Runtime:
    """Brings a running HAProxy to hold given tables.

    Args:
        folder: that it was started in.
        words: a server of a version -> the words that define it.
        most: requests that a server answers at a time.
    """

    def __init__(self, folder: Path, words: Callable[[Server], str], most: int) -> None:
        self.folder, self.words, self.most = folder, words, most

    def apply(self, tables: Tables) -> None:
        """Have the tables in force. No request is cut: servers that are to go get no new ones.

        Servers come first and go last, and what requests draw from is replaced at once, so that each request sees
        either the old routing or the new one.

        Raises:
            RunError: HAProxy refused, or holds something else afterwards.
        """
        state, *maps = self._ask("show servers state", *(f"show map {name}" for name in (MODELS, SHARES, SERVERS)))
        found, (models, shares, labels) = _servers(state), map(_map, maps)
        new = [
            *(f"add map {SERVERS} {n} {label}" for n, label in tables.labels.items() if n not in labels),
            *(f"set map {SERVERS} {n} {label}" for n, label in tables.labels.items() if labels.get(n, label) != label),
        ]
        for slot, wanted in tables.slots.items():
            for name, server in wanted.items():
                new += self._coming(f"{slot}/{name}", server, found.get(slot, {}).get(name))
        *_, for_shares, for_models = self._do(*new, f"prepare map {SHARES}", f"prepare map {MODELS}")
        # Numbers of routes are never used again: draws of the present models stay valid until the new ones are there.
        kept = {drawn: slot for drawn, slot in shares.items() if first_number(drawn) in models.values()}
        changes = [*_filled(SHARES, for_shares, kept | tables.shares), *_filled(MODELS, for_models, tables.models)]
        for slot, present in found.items():
            if slot in tables.slots:
                changes += self._going(slot, present, tables.slots[slot])
        self._do(*changes)
        self._verify(tables)

    def move_control(self, host: str, port: int) -> None:
        """Have the control API at another address."""
        self._do(f"set server control/control addr {host} port {port}")

    def clear(self, current: set[str]) -> list[str]:
        """Delete servers that were told to go and on which nothing runs any more.

        Args:
            current: slots that requests are sent to. Others are emptied once nothing runs there.

        Returns:
            The slots that are empty and not current.

        Raises:
            OSError: HAProxy does not answer.
        """
        busy, found = use(self.folder), _servers(ask(self.folder, "show servers state")[0])
        idle = {slot for slot, running in busy.items() if slot not in current and running == Use(0, 0)}
        commands = []
        for slot in busy:
            for name, server in found.get(slot, {}).items():
                if slot in idle and server.ready:
                    commands.append(f"set server {slot}/{name} state maint")
                if slot in idle or not server.ready:
                    commands.append(f"del server {slot}/{name}")  # refused while a request runs there
        if commands:
            ask(self.folder, *commands)
            state, shown = ask(self.folder, "show servers state", f"show map {SERVERS}")
            found = _servers(state)
            there = {name for servers in found.values() for name in servers}
            if gone := [f"del map {SERVERS} {name}" for name in _map(shown) if name not in there]:
                ask(self.folder, *gone)
        return [slot for slot in idle if not found.get(slot)]

    def cut_unreachable(self) -> None:
        """End the connections to servers whose nodes have vanished; what had no answer yet is sent to other servers.

        Keepalive's probes find connections that wait for an answer. They are not sent while something is not
        acknowledged, such as a request that was on its way when the node went, and HAProxy has no time-out for that
        (``tcp-ut``) on servers that are added at run time.

        Raises:
            OSError: HAProxy does not answer.
        """
        if servers := unreachable(self.folder, _UNREACHABLE_SECONDS):
            ask(self.folder, *(f"shutdown sessions server {path}" for path in servers))

    def _coming(self, path: str, server: Server, found: Found | None) -> list[str]:
        if found is None:
            return [f"add server {path} {self.words(server)}", f"enable server {path}", f"enable health {path}"]
        return [] if found.ready else [f"set server {path} state ready"]

    def _going(self, slot: str, present: Iterable[str], wanted: dict[str, Server]) -> list[str]:
        commands = [f"set server {slot}/{name} state maint" for name in present if name not in wanted]
        if commands and all(server.spare for server in wanted.values()):
            # Requests that wait in the slot are not taken up by a server that is ready already, until it is told how
            # many it may take. Making it ready again would do as well, but for the moment in which no server is ready.
            commands += [f"set maxconn server {slot}/{name} {self.most}" for name in wanted]
        return commands

    def _ask(self, *commands: str) -> list[str]:
        try:
            return ask(self.folder, *commands)
        except OSError as error:
            raise RunError(f"HAProxy does not answer: {error}") from error

    def _do(self, *commands: str) -> list[str]:
        answers = self._ask(*commands)
        for command, answer in zip(commands, answers, strict=True):
            if answer and not _DONE.match(answer):
                raise RunError(f"HAProxy refused `{command}`: {answer}")
        return answers

    def _verify(self, tables: Tables) -> None:
        state, models = self._ask("show servers state", f"show map {MODELS}")
        found = _servers(state)
        ready = {slot: {n for n, s in found.get(slot, {}).items() if s.ready} for slot in tables.slots}
        if ready != {slot: set(wanted) for slot, wanted in tables.slots.items()} or _map(models) != tables.models:
            raise RunError(f"HAProxy holds other tables than it was given: {ready}")


_DONE = re.compile(r"New server registered\.|New version created: \d+|.*changed from .* to |no need to change")


def _filled(name: str, prepared: str, entries: dict[str, str]) -> list[str]:
    """Commands that replace a map at once, given the answer to ``prepare map``."""
    number = prepared.rsplit(" ", 1)[1]
    return [*(f"add map @{number} {name} {k} {v}" for k, v in entries.items()), f"commit map @{number} {name}"]
