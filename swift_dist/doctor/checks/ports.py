"""The port bands of the launchers: each port is bound, all are held, then released.

This tells a person what is in the way. Nothing relies on it later: who needs a port binds it and keeps it.
"""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Any

from swift_dist.doctor.values import Check, Exam, Facts, Finding, Here, Team, on_node

_AT_ONCE = 128
"""Ports held at a time: fewer than any limit on open files."""
_NAMED = 5


def observe(here: Here) -> dict[str, Any]:
    taken: dict[str, list[int]] = {}
    for name, (first, last) in here.exam.bands.items():
        for start in range(first, last + 1, _AT_ONCE):
            taken.setdefault(name, []).extend(_taken(range(start, min(start + _AT_ONCE, last + 1))))
    wanted = [port for ports in taken.values() for port in ports]
    return {"taken": taken, "owners": _owners(wanted) if wanted else {}, "ephemeral": _ephemeral()}


def _taken(ports: range) -> list[int]:
    """Those that cannot be bound on all addresses, as a server of ours would."""
    found = []
    with contextlib.ExitStack() as held:
        for port in ports:
            server = held.enter_context(socket.socket())
            try:
                server.bind(("", port))
                server.listen(1)
            except OSError:
                found.append(port)
    return found


def _owners(ports: list[int]) -> dict[int, str]:
    """Who listens there, as far as we may know."""
    import psutil

    owners: dict[int, str] = {}
    with contextlib.suppress(psutil.Error):
        for entry in psutil.net_connections("tcp"):
            if entry.laddr and entry.laddr.port in ports and entry.pid:
                with contextlib.suppress(psutil.Error):
                    owners[entry.laddr.port] = f"{psutil.Process(entry.pid).name()}, process {entry.pid}"
    return owners


def _ephemeral() -> tuple[int, int] | None:
    """Ports that the kernel gives to outgoing connections."""
    try:
        first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    except (OSError, ValueError):
        return None
    return int(first), int(last)


def examine(team: Team) -> Facts:
    """On one of the nodes where all are this machine: they would find each other's."""
    nodes = team.nodes[:1] if team.exam.simulated else team.nodes
    return team.values(observe, nodes=[node.name for node in nodes])


def judge(facts: Facts, exam: Exam) -> list[Finding]:
    findings = []
    for node, fact in facts.items():
        for name, ports in fact["taken"].items():
            if ports:
                findings.append(_blocked(node, name, ports, fact["owners"], exam.bands[name]))
        for name, (first, last) in exam.bands.items():
            if fact["ephemeral"] and first <= fact["ephemeral"][1] and last >= fact["ephemeral"][0]:
                low, high = fact["ephemeral"]
                text = (
                    f"the kernel may give ports of {first}-{last} ({name}) to any connection: its range is {low}-{high}"
                )
                advice = (
                    "sysctl net.ipv4.ip_local_port_range='32768 60999', or reserve the band: ip_local_reserved_ports"
                )
                findings.append(on_node("ports", node, "warn", text, advice))
    if not findings and facts:
        bands = ", ".join(f"{first}-{last} ({name})" for name, (first, last) in exam.bands.items())
        findings.append(Finding("ports", "all", "ok", f"free: {bands}" if bands else "no launcher has a band"))
    return findings


def _blocked(node: str, name: str, ports: list[int], owners: dict[int, str], band: tuple[int, int]) -> Finding:
    size = band[1] - band[0] + 1
    shown = ", ".join(f"{p} ({owners[p]})" if p in owners else str(p) for p in ports[:_NAMED])
    more = f" and {len(ports) - _NAMED} more" if len(ports) > _NAMED else ""
    text = f"{len(ports)} of the {size} ports {band[0]}-{band[1]} ({name}) are taken: {shown}{more}"
    advice = "end what holds them if it is a leftover; torchrun takes the next port, a Slurm job that meets one fails"
    return on_node("ports", node, "bad" if len(ports) * 2 >= size else "warn", text, advice)


CHECK = Check(judge, examine)
