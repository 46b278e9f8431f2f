"""The same versions of what computes, on every node, as the driver has them."""

from __future__ import annotations

from swift_dist.doctor.values import Check, Exam, Facts, Finding, Here, everywhere, on_node

DECISIVE = ("python", "swift-dist", "torch", "megatron-core", "ray", "nccl", "transformer-engine")
"""Another version of these gives other numbers, another format, or ranks that do not understand each other."""

ON_NODES_ONLY = ("nccl", "transformer-engine")


def observe(here: Here) -> dict[str, str]:
    from swift_dist.runs.manifest import versions

    return versions()


def judge(facts: Facts, exam: Exam) -> list[Finding]:
    names = {name for found in facts.values() for name in found} | set(exam.versions)
    wanted = {name: version for name in sorted(names) if (version := _wanted(name, facts, exam))}
    findings = []
    for node, found in facts.items():
        other = [name for name in (*DECISIVE, *wanted) if name in names and found.get(name) != wanted.get(name)]
        decisive = [name for name in DECISIVE if name in other]
        if not other:
            continue
        shown = decisive or other
        text = ", ".join(f"{name} {found.get(name, 'none')} (wanted: {wanted.get(name, 'none')})" for name in shown)
        install = " ".join(f"{name}=={wanted[name]}" for name in shown if name in wanted and name != "python")
        advice = f"install the same as elsewhere: pip install {install}" if install else "use the driver's Python there"
        findings.append(on_node("versions", node, "bad" if decisive else "warn", text, advice))
    if not findings:
        text = ", ".join(f"{name} {wanted[name]}" for name in DECISIVE if name in wanted)
        findings.append(Finding("versions", "all", "ok", text))
    return findings


def _wanted(name: str, facts: Facts, exam: Exam) -> str | None:
    """The driver's version. Where it does not compute, another build of it may be right, or one that it, which may be
    without a GPU, does not have: then what most nodes have."""
    driver = exam.versions.get(name)
    if exam.driver_computes:
        return driver
    found = [versions.get(name) for versions in facts.values()]
    most = max(found, key=lambda version: (found.count(version), version == driver), default=None)
    if name in ON_NODES_ONLY or (most and driver and most.partition("+")[0] == driver.partition("+")[0]):
        return most
    return driver


CHECK = Check(judge, everywhere(observe), short=True)
