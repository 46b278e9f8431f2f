"""The run folder's file system is one and the same on all nodes: what one writes, every other reads."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from swift_dist.doctor.values import Check, Exam, Facts, Finding, Here, Team, on_node

_APPEARS_SECONDS = 3.0
"""How long a file of another node may take to be seen. (A name that was never asked for is looked up at the server, so
that caches of file attributes, half a minute with NFS, do not matter.)"""


def write(here: Here) -> str | None:
    """Leave a canary; returns why that was not possible."""
    file = _canary(here.exam, here.node.name)
    if not file.parent.is_dir():
        return "there is no such folder"
    try:
        with file.open("x") as stream:
            stream.write(here.node.name)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return None


def read(here: Here, writers: list[str]) -> dict[str, str]:
    """What is wrong with the others' canaries, by who wrote them."""
    wrong: dict[str, str] = {}
    deadline = time.monotonic() + _APPEARS_SECONDS
    for writer in writers:
        while True:
            try:
                content = _canary(here.exam, writer).read_text()
                if content != writer:
                    wrong[writer] = f"reads {content[:40]!r}"
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    wrong[writer] = error.strerror or str(error)
                    break
                time.sleep(0.05)
    return wrong


def remove(here: Here) -> None:
    with contextlib.suppress(OSError):
        _canary(here.exam, here.node.name).unlink()


def _canary(exam: Exam, node: str) -> Path:
    return Path(exam.folder) / f".swift-dist-doctor-{exam.token}-{node.replace('/', '_')}"


def examine(team: Team) -> Facts:
    """By node ``{"write": reason or None, "unread": {writer: reason}}``."""
    written = team.values(write)
    writers = [node for node, reason in written.items() if reason is None]
    try:
        unread = team.values(read, dict.fromkeys(written, writers)) if writers else {}
    finally:
        team.ask(remove, nodes=writers)
    return {node: {"write": reason, "unread": unread.get(node, {})} for node, reason in written.items()}


def judge(facts: Facts, exam: Exam) -> list[Finding]:
    findings = []
    for node, fact in facts.items():
        if fact["write"]:
            advice = "name a folder on a shared file system that is writable on every node: --output DIR"
            text = f"{exam.folder} cannot be written: {fact['write']}"
        elif fact["unread"]:
            advice = f"mount the same file system at {exam.folder} on every node, or name a shared folder: --output DIR"
            text = f"does not see in {exam.folder} what was written on {_who(fact['unread'])}"
        else:
            continue
        findings.append(on_node("shared_folder", node, "bad", text, advice))
    alone = [f for f in findings if facts[f.node]["unread"]]
    if len(alone) == len(facts) > 2:  # nobody sees the one that has another folder; it sees nobody
        odd = [n for n, fact in facts.items() if len(fact["unread"]) == len(facts) - 1]
        findings = [f for f in findings if f.node in odd] if len(odd) < len(facts) else findings
    if not findings:
        text = f"{exam.folder}: " + (
            "written and read" if len(facts) == 1 else f"what each of {len(facts)} nodes wrote, all read"
        )
        findings.append(Finding("shared_folder", "all", "ok", text))
    return findings


def _who(unread: dict[str, Any]) -> str:
    return ", ".join(f"{writer} ({reason})" for writer, reason in sorted(unread.items()))


CHECK = Check(judge, examine, short=True, seconds=5.0)
