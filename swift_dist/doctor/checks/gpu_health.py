"""Memory errors, Xid events and throttling of every GPU, through nvidia-ml-py and the kernel's log.

NVML reports Xid events only from the moment one listens, so those of the past are read from the kernel's log, where it
may be read (root, or kernel.dmesg_restrict 0).
"""

from __future__ import annotations

import os
import re
from typing import Any

from swift_dist.doctor.nvidia import device_files, load_nvml
from swift_dist.doctor.values import Check, Exam, Facts, Finding, Here, everywhere, on_node

DRAIN_XIDS = {
    48: "double-bit memory error",
    63: "a memory row was retired or remapped",
    64: "a memory row could not be remapped",
    74: "NVLink error",
    79: "the GPU has fallen off the bus",
    92: "many single-bit memory errors",
    94: "contained memory error",
    95: "uncontained memory error",
    119: "the GPU's system processor does not answer",
    120: "error of the GPU's system processor",
}
"""Xids that the hardware is to blame for; others come from programs too. NVIDIA, XID Errors, r590."""

SLOW_REASONS = {
    0x0008: "hardware slowdown",
    0x0020: "software thermal slowdown",
    0x0040: "hardware thermal slowdown",
    0x0080: "hardware power brake",
}
"""Bits of nvmlDeviceGetCurrentClocksEventReasons that cost speed under load and that nobody asked for. nvml.h"""

_DRAIN = "drain this node, reset the GPU or have it replaced (nvidia-smi -q -d ECC,ROW_REMAPPER); exclude it until then"


def observe(here: Here) -> dict[str, Any]:
    nvml = load_nvml()
    gpus = [_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())] if nvml else []
    return {
        "files": device_files(),
        "library": nvml is not None,
        "gpus": gpus,
        "xids": _xids() if device_files() else {},
    }


def _gpu(nvml: Any, index: int) -> dict[str, Any]:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
    except nvml.NVMLError as error:  # lost, or in an error that only a reset ends
        return {"index": index, "error": str(error)}

    def asked(function: Any, *arguments: Any) -> Any:
        try:
            return function(handle, *arguments)
        except nvml.NVMLError:  # this GPU has no such counter
            return None

    remapped = asked(nvml.nvmlDeviceGetRemappedRows)
    reasons = asked(nvml.nvmlDeviceGetCurrentClocksThrottleReasons)  # its old name, which every release has
    return {
        "index": index,
        "bus": asked(nvml.nvmlDeviceGetPciInfo).busId if asked(nvml.nvmlDeviceGetPciInfo) else "",
        "ecc_on": bool((asked(nvml.nvmlDeviceGetEccMode) or (0, 0))[0]),
        "uncorrected": asked(
            nvml.nvmlDeviceGetTotalEccErrors, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        ),
        "remap_pending": bool(remapped[2]) if remapped else False,
        "remap_failed": bool(remapped[3]) if remapped else False,
        "slow_because": [text for bit, text in SLOW_REASONS.items() if reasons and reasons & bit],
        "celsius": asked(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
    }


def _xids() -> dict[str, list[int]] | None:
    """Xid numbers in the kernel's log by PCI bus id; None: it may not be read."""
    try:
        descriptor = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    lines = []
    try:
        while True:
            lines.append(os.read(descriptor, 8192).decode(errors="replace"))
    except BlockingIOError:
        pass  # all of it
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return parse_xids(lines)


def parse_xids(lines: list[str]) -> dict[str, list[int]]:
    """From lines such as ``NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', GPU has fallen off the bus.``"""
    found: dict[str, list[int]] = {}
    for line in lines:
        if match := re.search(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)", line):
            found.setdefault(match[1], []).append(int(match[2]))
    return found


def judge(facts: Facts, exam: Exam) -> list[Finding]:
    findings = []
    looked_at = 0
    for node, fact in facts.items():
        if fact["files"] and not fact["library"]:
            advice = "pip install 'swift-dist[gpu]' (nvidia-ml-py), and see that nvidia-smi works"
            findings.append(on_node("gpu_health", node, "warn", "its GPUs cannot be asked for their health", advice))
        for gpu in fact["gpus"]:
            looked_at += 1
            findings += _judge_gpu(node, gpu)
        for bus, numbers in (fact["xids"] or {}).items():
            named = [f"{n} ({DRAIN_XIDS[n]})" for n in dict.fromkeys(numbers) if n in DRAIN_XIDS]
            if named:
                text = f"GPU at {bus}: Xid {', '.join(named)} since the node started"
                findings.append(on_node("gpu_health", node, "bad", text, _DRAIN))
        if fact["files"] and fact["xids"] is None:
            advice = "sysctl kernel.dmesg_restrict=0, or look yourself: dmesg | grep Xid"
            findings.append(
                on_node("gpu_health", node, "warn", "past Xid events: the kernel's log is closed to us", advice)
            )
    if not findings:
        text = f"{looked_at} GPUs: no memory error, no Xid, none slowed down" if looked_at else "no GPU to look at"
        findings.append(Finding("gpu_health", "all", "ok", text))
    return findings


def _judge_gpu(node: str, gpu: dict[str, Any]) -> list[Finding]:
    name = f"GPU {gpu['index']}"
    if "error" in gpu:
        return [on_node("gpu_health", node, "bad", f"{name} does not answer: {gpu['error']}", _DRAIN)]
    findings = []
    if gpu["uncorrected"]:
        text = f"{name}: {gpu['uncorrected']} uncorrected memory errors since its driver was loaded"
        findings.append(on_node("gpu_health", node, "bad", text, _DRAIN))
    if gpu["remap_failed"]:
        findings.append(on_node("gpu_health", node, "bad", f"{name}: a memory row could not be remapped", _DRAIN))
    if gpu["remap_pending"]:
        text = f"{name}: a memory row waits to be remapped"
        findings.append(on_node("gpu_health", node, "warn", text, "reset this GPU when it is idle: nvidia-smi -r"))
    if gpu["slow_because"]:
        text = f"{name} is slowed down: {', '.join(gpu['slow_because'])} ({gpu['celsius']} °C)"
        advice = "look at cooling and power of this node; one slow GPU slows all ranks"
        findings.append(on_node("gpu_health", node, "warn", text, advice))
    return findings


CHECK = Check(judge, everywhere(observe))
