"""submission.json in a run folder: by whom its job was submitted, so that another process finds it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swift_dist.runs.files import read_json, write_json

NAME = "submission.json"


def write_submission(run: Path, values: dict[str, Any]) -> None:
    """Note the fields of a ``launchers._base.Submission``. Makes the folder, which is no run before it begins."""
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / NAME, values)


def read_submission(run: Path) -> dict[str, Any] | None:
    """What `write_submission` noted; None if nobody submitted this run."""
    return read_json(run / NAME)
