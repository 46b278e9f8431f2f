"""What ranks say of themselves: through files to their node's driver, and from other nodes through the meeting to the
first node's.

A report is a dict with ``rank``, ``attempt`` and ``kind``: "place" (``host``, ``threads``) at the start; at the end
"result", "job" or "run" (an error that the run itself raised: starting again would change nothing), "communication" (a
peer was gone) or "error" (any other). Drivers report as well, without a rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swift_dist.runs.files import read_json
from swift_dist.torchrun.meeting import Meeting

FINAL = ("job", "run")


class Reports:
    """Of this node's ranks; on the first node, of all.

    Args:
        folder: into which this node's ranks write (`swift_dist.torchrun.rank`).
        meeting: with the other nodes.

    Attributes:
        of_all: whether this is the first node.
    """

    def __init__(self, folder: Path, meeting: Meeting) -> None:
        self.folder = folder
        self.of_all = meeting.is_first
        self._meeting = meeting
        self._own: dict[str, dict[str, Any]] = {}

    def read(self) -> None:
        """Look for news; what is new here is passed on to the first node."""
        for path in sorted(self.folder.glob("*.json")):
            report = read_json(path)
            if report and report != self._own.get(path.name):
                self._own[path.name] = report
                self._meeting.tell(report)

    def _all(self) -> list[dict[str, Any]]:
        return [*self._own.values(), *self._meeting.heard()]

    @property
    def places(self) -> list[dict[str, Any]]:
        """By rank."""
        return sorted((r for r in self._all() if r["kind"] == "place"), key=lambda place: place["rank"])

    @property
    def ends(self) -> list[dict[str, Any]]:
        """Of the newest attempt that a rank ended."""
        ends = [report for report in self._all() if report["kind"] != "place"]
        newest = max((report["attempt"] for report in ends), default=0)
        return [report for report in ends if report["attempt"] == newest]

    @property
    def is_lost(self) -> bool:
        """On the first of several nodes: whether ranks of another ended in an error. No torchrun starts them again."""
        return any(report["kind"] in ("error", "communication") for report in self._meeting.heard())

    def have_all_ended(self, num_ranks: int) -> bool:
        """Whether that many ranks of this node have said how they ended."""
        return sum(report["kind"] != "place" for report in self._own.values()) >= num_ranks

    def add(self, report: dict[str, Any]) -> None:
        """Of this node's driver, to this and the first node."""
        self._own[""] = report
        self._meeting.tell(report)

    def silent(self) -> list[dict[str, Any]]:
        """Places of this node's ranks that have not said how they ended, in the newest attempt."""
        newest = max((report["attempt"] for report in self._own.values()), default=0)
        now = [report for report in self._own.values() if report["attempt"] == newest]
        ended = {report.get("rank") for report in now if report["kind"] != "place"}
        return [report for report in now if report["kind"] == "place" and report["rank"] not in ended]

    @property
    def is_final(self) -> bool:
        return any(report["kind"] in FINAL for report in self.ends)
