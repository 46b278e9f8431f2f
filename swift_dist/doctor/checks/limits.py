"""Limits that the node's processes run under: open files, locked memory, core files."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

from swift_dist.doctor.values import Check, Exam, Facts, Finding, Here, everywhere, gib, on_node

WARN_FILES = 8192
BAD_FILES = 1024
"""A rank opens a socket for each peer and each channel, and Ray some hundreds of its own (it asks for 65535)."""

_RAISE = "raise it where the node's Ray or the scheduler's daemon is started: {} in limits.conf or its systemd unit"


def observe(here: Here) -> dict[str, Any]:
    pattern = Path("/proc/sys/kernel/core_pattern")
    infiniband = Path("/sys/class/infiniband")
    return {
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
        "core_is_piped": pattern.exists() and pattern.read_text().startswith("|"),
        "infiniband": infiniband.is_dir() and any(infiniband.iterdir()),
    }


def judge(facts: Facts, exam: Exam) -> list[Finding]:
    findings = []
    for node, fact in facts.items():
        if -1 < fact["files"] < WARN_FILES:
            level = "bad" if fact["files"] < BAD_FILES else "warn"
            text = f"at most {fact['files']} open files (ulimit -n)"
            findings.append(on_node("limits", node, level, text, _RAISE.format("ulimit -n 65535, nofile")))  # type: ignore[arg-type]
        if fact["infiniband"] and fact["memlock"] != resource.RLIM_INFINITY:
            text = f"{gib(fact['memlock'])} of locked memory (ulimit -l), but InfiniBand registers what it sends"
            findings.append(on_node("limits", node, "bad", text, _RAISE.format("ulimit -l unlimited, memlock")))
        if fact["core"] == resource.RLIM_INFINITY and not fact["core_is_piped"]:
            text = "a rank that crashes writes all of its memory to disk (ulimit -c unlimited)"
            findings.append(on_node("limits", node, "warn", text, "ulimit -c 0, unless you want these core files"))
    if not findings and facts:
        least = min(fact["files"] if fact["files"] > -1 else 2**31 for fact in facts.values())
        findings.append(Finding("limits", "all", "ok", f"{least} open files or more"))
    return findings


CHECK = Check(judge, everywhere(observe))
