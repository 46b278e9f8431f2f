"""submission.json in a run folder: by whom its job was submitted, so that another process finds it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swift_dist.runs.files import now, read_json, write_json

NAME = "submission.json"


def write_submission(run: Path, values: dict[str, Any]) -> None:
    """Note the fields of a ``launchers._base.Submission``, when, and how many attempts the run had by then.

    Makes the folder, which is no run before it begins.
    """
    run.mkdir(parents=True, exist_ok=True)
    attempts = (read_json(run / "manifest.json") or {}).get("attempts", [])
    write_json(run / NAME, {**values, "submitted": now(), "attempts": len(attempts)})


def read_submission(run: Path) -> dict[str, Any] | None:
    """What `write_submission` noted; None if nobody submitted this run."""
    return read_json(run / NAME)


def remove_submission(run: Path) -> None:
    """Take it back: the job was refused. The folder goes too if nothing else is in it."""
    (run / NAME).unlink(missing_ok=True)
    if run.is_dir() and not any(run.iterdir()):
        run.rmdir()
