"""Free space for the checkpoints that the job will keep."""

from __future__ import annotations

import os
from typing import Any

from swift_dist.doctor.values import Check, Exam, Facts, Finding, Here, everywhere, gib

_LITTLE_BYTES = 2**30
"""Where nothing is known of the job: less than this is too little for logs and any checkpoint."""
_LITTLE_INODES = 1000


def observe(here: Here) -> dict[str, Any]:
    found = os.statvfs(here.exam.folder)
    return {
        "free": found.f_bavail * found.f_frsize,
        "inodes": found.f_favail if found.f_files else None,  # btrfs and some network file systems count none
        "filesystem": found.f_fsid,
    }


def judge(facts: Facts, exam: Exam) -> list[Finding]:
    if not facts:
        return []
    node, fact = min(facts.items(), key=lambda item: item[1]["free"])  # one file system, if it is shared
    free = fact["free"]
    needed = max(0, exam.checkpoint_bytes * exam.num_checkpoints - exam.held_bytes)
    where = f"{gib(free)} free at {exam.folder}" + (f" (on {node})" if len(facts) > 1 else "")
    advice = "free some, name another folder (--output DIR), or keep fewer checkpoints (checkpoint.keep, keep_every)"
    findings = []
    if exam.checkpoint_bytes:
        count = f"{exam.num_checkpoints} checkpoint{'s' * (exam.num_checkpoints > 1)} of {gib(exam.checkpoint_bytes)}"
        held = f", of which {gib(exam.held_bytes)} lie there" if exam.held_bytes else ""
        text = f"{where}; the job needs {gib(needed)} for {count}{held}"
        findings.append(
            Finding("space", "all", "bad" if needed > free else "ok", text, advice if needed > free else "")
        )
    else:
        little = free < _LITTLE_BYTES
        findings.append(Finding("space", "all", "bad" if little else "ok", where, advice if little else ""))
    if fact["inodes"] is not None and fact["inodes"] < _LITTLE_INODES:
        text = f"{fact['inodes']} files more can be made at {exam.folder}"
        findings.append(
            Finding("space", "all", "bad", text, "remove files there, or name another folder: --output DIR")
        )
    return findings


CHECK = Check(judge, everywhere(observe), short=True, seconds=5.0)
