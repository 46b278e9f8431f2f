"""How many GPUs a node has: its device files, the driver library, Ray's books, against what is needed."""

from __future__ import annotations

from typing import Any

from swift_dist.doctor.nvidia import device_files, load_nvml, visible_devices
from swift_dist.doctor.values import Check, Exam, Facts, Finding, Here, everywhere, on_node

_LOST = "a GPU may have fallen off the bus: nvidia-smi and dmesg (Xid 79) on this node say more; drain it and reboot"


def observe(here: Here) -> dict[str, Any]:
    nvml = load_nvml()
    visible = visible_devices()
    return {
        "files": device_files(),
        "library": nvml.nvmlDeviceGetCount() if nvml else None,
        "visible": None if visible is None else len([v for v in visible.split(",") if v.strip() not in ("", "-1")]),
        "ray": int(here.node.resources.get("GPU", 0)) if here.node.id else None,
    }


def judge(facts: Facts, exam: Exam) -> list[Finding]:
    findings = []
    most = max((usable(fact) for fact in facts.values()), default=0)
    for node, fact in facts.items():
        count = usable(fact)
        if fact["library"] is not None and fact["library"] < fact["files"]:
            text = f"the driver library finds {fact['library']} of {fact['files']} GPUs"
            findings.append(on_node("gpus", node, "bad", text, _LOST))
        elif count < exam.gpus:
            findings.append(
                on_node("gpus", node, "bad", f"{count} of the {exam.gpus} GPUs that are needed", _why(fact))
            )
        elif count < most:
            findings.append(on_node("gpus", node, "warn", f"{count} GPUs; other nodes have {most}", _why(fact)))
    if not findings:
        text = f"{most} on every node" if most else "none anywhere; ranks compute on the CPU"
        findings.append(Finding("gpus", "all", "ok", text))
    return findings


def usable(fact: dict[str, Any]) -> int:
    """What a job can have there."""
    counts = [fact["files"] if fact["library"] is None else fact["library"]]
    counts += [fact[name] for name in ("visible", "ray") if fact[name] is not None]
    return min(counts)


def _why(fact: dict[str, Any]) -> str:
    present = fact["files"] if fact["library"] is None else fact["library"]
    if fact["visible"] is not None and fact["visible"] < present and fact["visible"] == usable(fact):
        return "CUDA_VISIBLE_DEVICES hides the others: ask the scheduler for more, or unset it before ray start"
    if fact["ray"] is not None and fact["ray"] < present:
        return "Ray was started with fewer: ray start --num-gpus N on this node"
    return _LOST + "; or ask for fewer: --nproc_per_node N, --cluster.accelerator cpu"


CHECK = Check(judge, everywhere(observe), short=True, seconds=5.0)
