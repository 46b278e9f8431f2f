"""How a run ended, read from its folder: for whoever did not drive it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from swift_dist.runs.folder import RunFolder

EXPORTS = ("model", "adapter")
"""Folders of a run that hold its final weights in Hugging Face's or PEFT's form."""


def newest_step(folder: RunFolder) -> int | None:
    """The step that checkpoints/latest names."""
    try:
        return int((folder.checkpoints / "latest").read_text().strip().removeprefix("step_"))
    except (OSError, ValueError):
        return None


def exported(folder: RunFolder) -> str | None:
    """The folder of a run's final weights, if there is one."""
    return next((str(folder.path / name) for name in EXPORTS if (folder.path / name).is_dir()), None)


def read_outcome(run: Path, after: int = 0) -> dict[str, Any] | None:
    """What ``swift_dist.job.run`` returned, of the newest attempt if that has ended; else None.

    Args:
        run: the run folder.
        after: how many attempts are too old to count (see `submission.write_submission`).
    """
    folder = RunFolder(run)
    attempts, status = folder.manifest().get("attempts", []), folder.status()
    if len(attempts) <= after or status is None or not attempts[-1].get("ended"):
        return None
    newest = attempts[-1]
    began, ended = (datetime.fromisoformat(newest[key]) for key in ("started", "ended"))
    return {
        "state": newest["state"],
        "output": str(run),
        "export": exported(folder) if newest["state"] == "done" else None,
        "export_step": newest.get("export_step"),
        "message": newest.get("message", "") if newest["state"] == "done" else "",
        "step": status.step,
        "loss": status.loss,
        "checkpoint": newest_step(folder),
        "restarts": len(newest["restarts"]),
        "seconds": round((ended - began).total_seconds(), 3),
    }
