"""The job of a run that was submitted elsewhere, reached through the launcher that its submission.json names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swift_dist import plugins
from swift_dist.errors import JobError, RunError
from swift_dist.runs.folder import RunFolder
from swift_dist.runs.submission import NAME, read_submission

ACTIVE = ("waiting", "running")


class SubmittedJob:
    """What submission.json points to.

    Attributes:
        noted: its contents.
        handle: a ``launchers._base.Handle``.
    """

    def __init__(self, path: Path, noted: dict[str, Any]) -> None:
        """
        Raises:
            JobError: no such launcher, or the file is not one of ours.
        """
        try:
            launcher = plugins.find("swift_dist.launchers", noted["launcher"], "LAUNCHER")
            base = plugins.find("swift_dist.launchers", "swift_dist.launchers._base:Submission", "")
            self.handle = launcher.attach(base(noted["launcher"], noted["id"], noted["address"]))
        except (plugins.UnknownPlugin, KeyError) as error:
            raise JobError("run", f"{path / NAME} is of no use: {error}", "remove it") from None
        self.noted = noted

    @classmethod
    def of(cls, folder: RunFolder) -> SubmittedJob | None:
        """The newest submission of this run; None if nobody submitted it."""
        noted = read_submission(folder.path)
        return cls(folder.path, noted) if noted else None

    @classmethod
    def not_begun(cls, folder: RunFolder) -> SubmittedJob | None:
        """The newest submission, if the run folder knows nothing of it yet: it waits, starts, or failed to."""
        noted = read_submission(folder.path)
        if not noted or len(folder.manifest().get("attempts", [])) > noted.get("attempts", 0):
            return None
        return cls(folder.path, noted)

    @property
    def where(self) -> str:
        """For people: launcher, id and address."""
        address = f" at {self.noted['address']}" if self.noted["address"] else ""
        return f"{self.noted['launcher']} {self.noted['id']}{address}"

    def state(self) -> tuple[str, str]:
        """Its state, or "unknown", and why that is."""
        try:
            return self.handle.status(), ""
        except (JobError, RunError) as error:
            return "unknown", str(error)
