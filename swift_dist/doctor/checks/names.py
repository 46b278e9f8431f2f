"""The node's hostname, and how long names take to be looked up: every connection that logs a peer pays for it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

from swift_dist.doctor.values import Check, Exam, Facts, Finding, Here, everywhere, on_node

WARN_SECONDS = 1.0
BAD_SECONDS = 5.0


def observe(here: Here) -> dict[str, Any]:
    host = socket.gethostname()
    forward, forward_seconds = _timed(lambda: socket.gethostbyname(host))
    _, reverse_seconds = _timed(lambda: socket.gethostbyaddr(here.node.address)[0])
    return {
        "host": host,
        "address": forward,
        "forward_seconds": forward_seconds,
        "reverse_seconds": reverse_seconds,
    }


def _timed(look_up: Callable[[], str]) -> tuple[str | None, float]:
    began = time.monotonic()
    try:
        found = look_up()
    except OSError:
        found = None
    return found, time.monotonic() - began


def judge(facts: Facts, exam: Exam) -> list[Finding]:
    findings = []
    for node, fact in facts.items():
        if fact["address"] is None:
            text = f"its hostname {fact['host']} has no address"
            findings.append(
                on_node("names", node, "warn", text, f"add {fact['host']} to /etc/hosts or to the site's DNS")
            )
        slow = {
            kind: fact[f"{kind}_seconds"] for kind in ("forward", "reverse") if fact[f"{kind}_seconds"] > WARN_SECONDS
        }
        if slow:
            worst = max(slow.values())
            text = ", ".join(f"{kind} look-up of its own name took {seconds:.1f} s" for kind, seconds in slow.items())
            findings.append(
                on_node("names", node, "bad" if worst > BAD_SECONDS else "warn", text,
                        "a name server of /etc/resolv.conf is silent: correct it, or list the nodes in /etc/hosts")
            )  # fmt: skip
    doubles = {n: f["host"] for n, f in facts.items() if [g["host"] for g in facts.values()].count(f["host"]) > 1}
    if doubles and not exam.simulated:
        text = f"{len(doubles)} nodes call themselves {', '.join(sorted(set(doubles.values())))}"
        findings.append(Finding("names", "all", "warn", text, "give every node a hostname of its own: logs name them"))
    if not findings and facts:
        worst = max(max(fact["forward_seconds"], fact["reverse_seconds"]) for fact in facts.values())
        findings.append(Finding("names", "all", "ok", f"looked up in {worst * 1000:.0f} ms at most"))
    return findings


CHECK = Check(judge, everywhere(observe), seconds=15.0)
