"""What torch sees on a node that has GPUs, or should: a wheel for the CPU, or for a newer driver, sees none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from swift_dist.doctor.nvidia import device_files, visible_devices
from swift_dist.doctor.values import Check, Exam, Facts, Finding, Here, everywhere, on_node

_SECONDS = 25.0
_LOOK = """
import json, torch
found = {"version": torch.__version__, "cuda": torch.version.cuda, "count": torch.cuda.device_count(), "error": ""}
try:
    for index in range(found["count"]):
        torch.ones(8, device=f"cuda:{index}").sum().item()
except Exception as error:
    found["error"] = str(error).splitlines()[0]
found["names"] = sorted({torch.cuda.get_device_name(i) for i in range(found["count"])})
print(json.dumps(found))
"""


def observe(here: Here) -> dict[str, Any] | None:
    """None where there is nothing to see: importing torch takes seconds."""
    if not device_files() and not here.exam.gpus:
        return None
    variables = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    visible = visible_devices()
    if visible is not None:
        variables["CUDA_VISIBLE_DEVICES"] = visible
    done = subprocess.run(
        [sys.executable, "-c", _LOOK], env=variables, capture_output=True, text=True, timeout=_SECONDS, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"version": "", "cuda": None, "count": 0, "error": last, "names": []}
    return json.loads(done.stdout.splitlines()[-1])


def judge(facts: Facts, exam: Exam) -> list[Finding]:
    findings = []
    for node, fact in facts.items():
        if fact is None:
            continue
        if fact["error"]:
            advice = "run nvidia-smi and `python -c 'import torch; torch.ones(1).cuda()'` on this node"
            findings.append(on_node("accelerator", node, "bad", f"torch fails there: {fact['error']}", advice))
        elif fact["count"] < exam.gpus and fact["cuda"] is None:
            text = f"torch {fact['version']} there is built without CUDA; {exam.gpus} GPUs are needed"
            findings.append(on_node("accelerator", node, "bad", text, "install torch's CUDA build on this node"))
        elif fact["count"] < exam.gpus:
            text = f"torch sees {fact['count']} of the {exam.gpus} GPUs that are needed"
            advice = f"see the check gpus; and that the driver is new enough for CUDA {fact['cuda']} (nvidia-smi)"
            findings.append(on_node("accelerator", node, "bad", text, advice))
    if not findings:
        names = sorted({name for fact in facts.values() if fact for name in fact["names"]})
        if len(names) > 1:
            text = f"different GPUs: {', '.join(names)}"
            findings.append(Finding("accelerator", "all", "warn", text, "the slowest of them sets the pace of all"))
        else:
            text = f"torch computes on {names[0]}" if names else "no GPU: torch computes on the CPU"
            findings.append(Finding("accelerator", "all", "ok", text))
    return findings


CHECK = Check(judge, everywhere(observe), seconds=30.0)
