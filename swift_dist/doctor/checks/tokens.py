"""Keys of the services that the job talks to are there, on the nodes as the ranks would find them. None is printed."""

from __future__ import annotations

import netrc
import os
from pathlib import Path

from swift_dist.doctor.values import Check, Exam, Facts, Finding, Here, everywhere, on_node


def observe(here: Here) -> dict[str, bool]:
    variables = {**os.environ, **here.exam.variables}

    def given(*names: str) -> bool:
        return any(variables.get(name) for name in names)

    home = Path(variables.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    return {
        "hub": given("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") or (home / "token").is_file(),
        "hub_offline": variables.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"),
        "wandb": given("WANDB_API_KEY") or _in_netrc("api.wandb.ai"),
        "wandb_offline": variables.get("WANDB_MODE", "") in ("offline", "disabled", "dryrun"),
        "swanlab": given("SWANLAB_API_KEY") or (Path("~/.swanlab/.netrc").expanduser()).is_file(),
        "swanlab_offline": variables.get("SWANLAB_MODE", "") in ("local", "offline", "disabled"),
    }


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def judge(facts: Facts, exam: Exam) -> list[Finding]:
    findings = []
    for node, fact in facts.items():
        if exam.hub_ids and not fact["hub"] and not fact["hub_offline"]:
            text = f"no HF_TOKEN for {', '.join(exam.hub_ids)}"
            advice = "export HF_TOKEN=... where you start the job (it travels to the ranks); public models need none"
            findings.append(on_node("tokens", node, "warn", text, advice))
        for tracker, key, mode in (
            ("wandb", "WANDB_API_KEY", "WANDB_MODE=offline"),
            ("swanlab", "SWANLAB_API_KEY", "SWANLAB_MODE=local"),
        ):
            if tracker in exam.trackers and not fact[tracker] and not fact[f"{tracker}_offline"]:
                text = f"report.trackers names {tracker}, but there is no {key}"
                advice = f"export {key}=... where you start the job (it travels to the ranks), or {mode}"
                findings.append(on_node("tokens", node, "bad", text, advice))
    if not findings and facts:
        needed = [*exam.hub_ids, *(t for t in exam.trackers if t != "mlflow")]
        text = f"there for {', '.join(needed)}" if needed else "none is needed"
        findings.append(Finding("tokens", "all", "ok", text))
    return findings


CHECK = Check(judge, everywhere(observe))
