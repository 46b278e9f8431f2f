"""Checks on a team: those that only look run at the same time, those that measure come after them."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field

from swift_dist.doctor.team import BaseTeam, CheckTeam
from swift_dist.doctor.values import ALL, LEVELS, Check, Finding
from swift_dist.errors import JobError
from swift_dist.plugins import UnknownPlugin, find, names

_ROOM = "swift_dist.doctor.checks"


@dataclass
class Report:
    """What was found, worst first within each check, and how long each check took (seconds)."""

    findings: list[Finding] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def bad(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "bad"]


def all_checks(wanted: Sequence[str] = (), short: bool = False) -> dict[str, Check]:
    """Checks by name.

    Args:
        wanted: only these (``package.module:ATTRIBUTE`` for one from outside); default: all of the room.
        short: only those of the short form.

    Raises:
        JobError: there is no such check.
    """
    found: dict[str, Check] = {}
    for name in wanted or names(_ROOM):
        try:
            check: Check = find(_ROOM, name, "CHECK")
        except UnknownPlugin as error:
            raise JobError("checks", str(error), f"--checks {(error.suggestions or error.known)[0]}") from None
        if wanted or not short or check.short:
            found[name] = check
    return found


def examine(team: BaseTeam, checks: dict[str, Check]) -> Report:
    """Run checks on a team, each to its deadline and all to the team's."""
    report = Report()
    for alone in (False, True):
        wave = {name: check for name, check in checks.items() if check.alone == alone}
        threads = [
            threading.Thread(target=_run, args=(team, name, check, report), daemon=True) for name, check in wave.items()
        ]
        for thread in threads:
            thread.start()
            if alone:
                thread.join()
        for thread in threads:
            thread.join()
    order = list(checks)
    report.findings.sort(key=lambda f: (order.index(f.check), -LEVELS.index(f.level), f.node))
    return report


def _run(team: BaseTeam, name: str, check: Check, report: Report) -> None:
    began = time.monotonic()
    view = CheckTeam(team, name, check.seconds)
    try:
        findings = check.judge(check.examine(view), team.exam)
    except Exception as error:
        text = traceback.format_exception_only(error)[-1].strip()
        # A fault of ours, not of the machines: it must not end a job.
        findings = [Finding(name, ALL, "warn", f"the check itself failed: {text}", "please report this")]
    report.findings += [*view.failed, *findings]
    report.seconds[name] = round(time.monotonic() - began, 2)
