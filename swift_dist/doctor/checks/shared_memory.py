"""/dev/shm: NCCL, data loaders and Ray's object store live in it; a container gets 64 MiB unless told otherwise."""

from __future__ import annotations

import os

from swift_dist.doctor.values import Check, Exam, Facts, Finding, Here, everywhere, gib, on_node

WARN_BYTES = 2**30
BAD_BYTES = 128 * 2**20
"""Docker's default of 64 MiB is too little for NCCL among the GPUs of one node (about 10 MiB a channel and peer)."""


def observe(here: Here) -> dict[str, int]:
    found = os.statvfs("/dev/shm")
    return {"size": found.f_blocks * found.f_frsize, "free": found.f_bavail * found.f_frsize}


def judge(facts: Facts, exam: Exam) -> list[Finding]:
    findings = []
    for node, fact in facts.items():
        if fact["free"] >= WARN_BYTES:
            continue
        text = f"/dev/shm has {gib(fact['free'])} free of {gib(fact['size'])}"
        advice = (
            "remove what dead processes left in /dev/shm"
            if fact["size"] >= WARN_BYTES
            else "docker run --shm-size=16g (or --ipc=host); Kubernetes: an emptyDir with medium Memory at /dev/shm"
        )
        findings.append(on_node("shared_memory", node, "bad" if fact["free"] < BAD_BYTES else "warn", text, advice))
    if not findings and facts:
        least = min(fact["free"] for fact in facts.values())
        findings.append(Finding("shared_memory", "all", "ok", f"{gib(least)} free in /dev/shm"))
    return findings


CHECK = Check(judge, everywhere(observe))
