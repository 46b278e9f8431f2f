"""CPUs that the node's processes may use, against what Ray believes and what the job asks.

Inside an allocation they differ: Slurm binds a step to its cores (affinity) or limits it (cgroup), while Ray, unless
told, counts otherwise. With too few in Ray's books a job waits for ever; with too many, ranks share cores.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from swift_dist.doctor.values import Check, Exam, Facts, Finding, Here, everywhere, on_node


def observe(here: Here) -> dict[str, Any]:
    return {
        "affinity": len(os.sched_getaffinity(0)),
        "quota": quota(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup")),
        "machine": os.cpu_count(),
        "ray": here.node.resources.get("CPU", 0.0) if here.node.id else None,
    }


def quota(cgroups: str, root: Path) -> float | None:
    """CPUs that the tightest cgroup around a process allows per time, version 2 or 1; None: no limit.

    Args:
        cgroups: its /proc/<pid>/cgroup.
        root: where the cgroup file systems are mounted.
    """
    limits = []
    for line in cgroups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = (
            root / controllers
            if controllers and (root / controllers).is_dir()
            else root / ("cpu" if controllers else "")
        )
        folder = base / path.lstrip("/")
        for place in (folder, *folder.parents):
            if limit := _limit(place):
                limits.append(limit)
            if place == base:
                break
    return min(limits, default=None)


def _limit(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            allowed, period = (folder / "cpu.max").read_text().split()
        else:
            allowed = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
    except (OSError, ValueError):
        return None
    return None if allowed in ("max", "-1") else int(allowed) / int(period)


def usable(fact: dict[str, Any]) -> int:
    return fact["affinity"] if fact["quota"] is None else min(fact["affinity"], max(1, math.floor(fact["quota"])))


def judge(facts: Facts, exam: Exam) -> list[Finding]:
    findings = []
    for node, fact in facts.items():
        have, ray = usable(fact), fact["ray"]
        seen = f"its processes may use {have} of the machine's {fact['machine']} CPUs"
        if ray is not None and ray < exam.cpus:
            text = f"Ray has {ray:g} CPUs there, the job asks {exam.cpus:g}: it would wait for ever; {seen}"
            advice = f"ray start --num-cpus {have} on this node; Slurm: --cpus-per-task on the srun that starts Ray too"
            findings.append(on_node("cpus", node, "bad", text, advice))
        elif ray is not None and ray > have and not exam.simulated:
            text = f"Ray believes in {ray:g} CPUs, but {seen}"
            findings.append(on_node("cpus", node, "warn", text, f"ray start --num-cpus {have} on this node"))
        elif have < exam.ranks and not exam.simulated:
            text = f"{exam.ranks} ranks share {have} CPUs: {seen}"
            advice = "ask the scheduler for more (Slurm: --cpus-per-task), or start fewer ranks: --nproc_per_node"
            findings.append(on_node("cpus", node, "warn", text, advice))
    if not findings and facts:
        counts = sorted({usable(fact) for fact in facts.values()})
        findings.append(Finding("cpus", "all", "ok", f"{' or '.join(map(str, counts))} a node"))
    return findings


CHECK = Check(judge, everywhere(observe))
