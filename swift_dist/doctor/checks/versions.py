"""The same versions of what computes, on every node, as the driver has them."""

from __future__ import annotations

from typing import Any

from swift_dist.doctor.values import Check, Exam, Facts, Finding, Here, everywhere, on_node

DECISIVE = ("python", "swift-dist", "torch", "megatron-core", "ray", "nccl", "transformer-engine")
"""Another version of these gives other numbers, another format, or ranks that do not understand each other."""


def observe(here: Here) -> dict[str, Any]:
    from swift_dist.runs.manifest import versions

    return {**versions(), **_nccl()}


def _nccl() -> dict[str, str]:
    """Of the wheel that torch's CUDA builds bring; what NCCL itself says would need torch to be imported."""
    import importlib.metadata

    for name in ("nvidia-nccl-cu13", "nvidia-nccl-cu12"):
        try:
            return {"nccl": importlib.metadata.version(name)}
        except importlib.metadata.PackageNotFoundError:
            continue
    return {}


def judge(facts: Facts, exam: Exam) -> list[Finding]:
    wanted = {**_nccl_of(facts), **exam.versions}
    findings = []
    for node, found in facts.items():
        other = {
            name: (found.get(name, "none"), wanted.get(name, "none"))
            for name in wanted.keys() | found.keys()
            if found.get(name) != wanted.get(name)
        }
        decisive = {name: other[name] for name in DECISIVE if name in other}
        shown = decisive or dict(sorted(other.items()))
        if not shown:
            continue
        text = ", ".join(f"{name} {here} (driver: {there})" for name, (here, there) in shown.items())
        install = " ".join(f"{name}=={there}" for name, (_, there) in shown.items() if name != "python")
        advice = f"install what the driver has: pip install {install}" if install else "use the driver's Python there"
        findings.append(on_node("versions", node, "bad" if decisive else "warn", text, advice))
    if not findings:
        text = ", ".join(f"{name} {wanted[name]}" for name in DECISIVE if name in wanted)
        findings.append(Finding("versions", "all", "ok", text))
    return findings


def _nccl_of(facts: Facts) -> dict[str, str]:
    """The version that most nodes have: a driver without a GPU may have none."""
    found = [versions["nccl"] for versions in facts.values() if "nccl" in versions]
    return {"nccl": max(set(found), key=found.count)} if found else {}


CHECK = Check(judge, everywhere(observe), short=True)
