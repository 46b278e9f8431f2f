"""How the encoding of streamed rows is, told by the driver through a small file to ranks that wait for rows.

The file is written every few seconds, so a driver that is gone is noticed as well: nobody waits for ever.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from swift_dist.data.work_folder import write_json
from swift_dist.errors import JobError, RunError

SILENT_SECONDS = 180.0  # shared file systems may show a change a minute late
_LATE_SECONDS = 60.0  # and a chunk later than the word that all are there
_WRITE_SECONDS = 3.0
_LOOK_SECONDS = 3.0
_AGAIN = "the same command goes on from the newest checkpoint, and with the rows that are encoded"


class StatusWriter:
    """The driver's side.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._beat, self._written = path, 0, 0.0

    def running(self) -> None:
        """The encoding goes on. Costs nothing where that was said a moment ago."""
        if time.monotonic() - self._written >= _WRITE_SECONDS:
            self._write({"state": "running"})

    def ended(self, error: Exception | None = None) -> None:
        """Nothing more will be encoded: all is, or `error` has happened."""
        if error is None:
            self._write({"state": "ended"})
        elif isinstance(error, JobError | RunError):
            key = error.key if isinstance(error, JobError) else ""
            self._write({"state": "failed", "key": key, "message": error.message, "remedy": error.remedy})
        else:
            self._write({"state": "failed", "key": "", "message": repr(error), "remedy": ""})

    def _write(self, value: dict[str, Any]) -> None:
        self._beat += 1
        write_json(self._path, {**value, "beat": self._beat})
        self._written = time.monotonic()


class StatusReader:
    """A rank's side.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._looked = path, 0.0
        self._seen: dict[str, Any] | None = None
        self._changed, self._waits = 0.0, False

    def check(self, waits: bool) -> None:
        """Look at the file, at most every few seconds.

        Args:
            waits: whether the caller waits for a chunk that is not there.

        Raises:
            JobError, RunError: the encoding has failed, as the driver says; or the caller waits although it has ended,
                or nothing was heard of it for `SILENT_SECONDS`.
        """
        now = time.monotonic()
        if waits and not self._waits:
            self._changed = now  # nobody listened before, and what was seen then may have come true since
        self._waits = waits
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        status = self._read()
        if status != self._seen:
            self._seen, self._changed = status, now
        if status and status["state"] == "failed":
            if status["key"]:
                raise JobError(status["key"], status["message"], status["remedy"])
            raise RunError(f"encoding rows failed: {status['message']}", status["remedy"] or _AGAIN)
        if waits and status and status["state"] == "ended" and now - self._changed > _LATE_SECONDS:
            raise RunError("encoded rows are missing or damaged: was data.cache emptied?", _AGAIN)
        if waits and now - self._changed > SILENT_SECONDS:
            raise RunError(f"nobody has encoded rows for {SILENT_SECONDS:.0f} s: the driver is gone or hangs", _AGAIN)

    def _read(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._path.read_text())
        except (OSError, ValueError):
            return None
