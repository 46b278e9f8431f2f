"""An examination of this machine by some of the doctor's checks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from swift_dist.doctor.examine import Report, all_checks, examine
from swift_dist.doctor.team import LocalTeam
from swift_dist.doctor.values import Exam, Finding, Node
from swift_dist.runs.manifest import versions


def look_here(folder: Path, *checks: str, seconds: float = 20.0, **exam: Any) -> Report:
    """Run checks on this machine."""
    node = Node("here")
    team = LocalTeam(
        node, Exam(**{"token": "t", "folder": str(folder), "versions": versions(), **exam}), time.monotonic() + seconds
    )
    return examine(team, all_checks(checks))


def only(report: Report) -> Finding:
    (finding,) = report.findings
    return finding
