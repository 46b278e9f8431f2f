"""The Hugging Face cache, where the ranks would look for it: readable and writable."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from swift_dist.doctor.values import Check, Exam, Facts, Finding, Here, everywhere, gib, on_node

_LITTLE_BYTES = 2**30


def observe(here: Here) -> dict[str, Any]:
    folder = cache_folder({**os.environ, **here.exam.variables})
    there = next(path for path in (folder, *folder.parents) if path.exists())
    fact: dict[str, Any] = {"folder": str(folder), "exists": folder.exists(), "unreadable": "", "unwritable": ""}
    try:
        next(there.iterdir(), None)
    except OSError as error:
        fact["unreadable"] = error.strerror or str(error)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        fact["unwritable"] = error.strerror or str(error)
    found = os.statvfs(there)
    return {**fact, "free": found.f_bavail * found.f_frsize}


def cache_folder(variables: dict[str, str]) -> Path:
    """As huggingface_hub finds it: HF_HUB_CACHE, else hub/ in HF_HOME, else in XDG_CACHE_HOME or ~/.cache."""
    if variables.get("HF_HUB_CACHE"):
        return Path(variables["HF_HUB_CACHE"]).expanduser().absolute()
    cache = Path(variables.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return (Path(variables.get("HF_HOME") or cache) / "hub").expanduser().absolute()


def judge(facts: Facts, exam: Exam) -> list[Finding]:
    level = "bad" if exam.hub_ids else "warn"  # nothing is fetched for a job whose files lie in folders
    findings = []
    for node, fact in facts.items():
        for what, verb in (("unreadable", "read"), ("unwritable", "written")):
            if fact[what]:
                text = f"{fact['folder']} cannot be {verb}: {fact[what]}"
                advice = (
                    "export HF_HOME=FOLDER that you may write to, on a file system with room; it travels to the ranks"
                )
                findings.append(on_node("hf_cache", node, level, text, advice))  # type: ignore[arg-type]
        if exam.hub_ids and fact["free"] < _LITTLE_BYTES:
            text = f"{gib(fact['free'])} free for {', '.join(exam.hub_ids)} at {fact['folder']}"
            findings.append(on_node("hf_cache", node, "bad", text, "export HF_HOME=FOLDER on a file system with room"))
    if not findings and facts:
        folders = sorted({fact["folder"] for fact in facts.values()})
        findings.append(Finding("hf_cache", "all", "ok", f"{', '.join(folders)}: readable and writable"))
    return findings


CHECK = Check(judge, everywhere(observe))
