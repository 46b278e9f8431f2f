"""PREFIX.work: what an interrupted `data prepare` leaves behind and the next one goes on with.

Inside: `plan.json` (what the work is for), `parts/` (finished units), `merged/` (output before it gets its name) and
`publish.json`, which exists once the output is whole: from then on it is only renamed, and whoever finds the folder
does so. The output's .idx appears last, and a dataset without .idx is none, so that nobody sees half of one.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from swift_dist.data.parts import Part
from swift_dist.errors import JobError, RunError

logger = logging.getLogger(__name__)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all, and flush it to disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as stream:
        json.dump(value, stream, indent=2)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


class WorkFolder:
    """The work folder of one output prefix, held by one process at a time.

    Args:
        prefix: of the output.

    Raises:
        JobError: another process holds it, or it cannot be made.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.path = prefix.with_name(prefix.name + ".work")
        self.parts, self.merged = self.path / "parts", self.path / "merged"
        self._plan, self._publish = self.path / "plan.json", self.path / "publish.json"
        self._lock_fd = -1
        try:
            self._lock()
        except OSError as error:
            raise JobError(
                "output", f"cannot write to {prefix.parent}: {error.strerror}", "give another --output"
            ) from None

    def _lock(self) -> None:
        path = self.path / "lock"
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:
                continue  # the holder has just removed the folder
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise JobError(
                    "output",
                    f"another `data prepare` is writing {self.prefix}",
                    "wait for it, or give another --output",
                ) from None
            except OSError as error:  # a file system without locks
                logger.warning("%s cannot be locked (%s): run one `data prepare` at a time on it", path, error.strerror)
            with suppress(FileNotFoundError):
                if os.fstat(fd).st_ino == path.stat().st_ino:
                    self._lock_fd = fd
                    return
            os.close(fd)  # the file that we hold was removed meanwhile

    def publish_leftover(self) -> bool:
        """Finish the renames of a run that was ended between them. Returns whether there was one."""
        if not self._publish.exists():
            return False
        self._rename(json.loads(self._publish.read_text()))
        self._empty()
        return True

    def begin(self, identity: dict[str, Any], overwrite: bool) -> None:
        """Take up the work for `identity`, or start it.

        Raises:
            JobError: the folder holds the work of another command, and not `overwrite`.
        """
        found = None
        with suppress(OSError, ValueError):
            found = json.loads(self._plan.read_text())
        if found is not None and found != identity and not overwrite:
            raise JobError(
                "output",
                f"{self.path} holds an interrupted run that differs in {', '.join(differences(found, identity))}",
                "repeat that command to finish it, or --overwrite true to discard it",
            )
        if found != identity:
            self._empty()
        self.parts.mkdir(exist_ok=True)
        self.merged.mkdir(exist_ok=True)
        for leftover in (*self.parts.glob(".*"), *self.merged.iterdir()):
            leftover.unlink()
        if found != identity:
            write_json(self._plan, identity)

    def finished_parts(self) -> list[Part]:
        """Parts of an earlier run that are whole; others are removed."""
        found = []
        for path in sorted(self.parts.glob("*.part")):
            try:
                found.append(Part(path))
            except (ValueError, KeyError, TypeError):
                logger.warning("%s is not whole: it is made again", path)
                path.unlink()
        return found

    def publish(self, remove: Iterable[Path], rename: Iterable[tuple[Path, Path]]) -> None:
        """Give the output its names, in order. Once the list is on disk, whoever comes next finishes it."""
        steps = {"remove": [str(path) for path in remove], "rename": [[str(a), str(b)] for a, b in rename]}
        write_json(self._publish, steps)
        self._rename(steps)

    def _rename(self, steps: dict[str, Any]) -> None:
        for path in steps["remove"]:
            Path(path).unlink(missing_ok=True)
        for source, target in steps["rename"]:
            if Path(source).exists():  # not done yet
                Path(source).replace(target)
            elif not Path(target).exists():
                raise RunError(f"{source} is gone", f"remove {self.path} and repeat the command")
        fd = os.open(self.prefix.parent, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _empty(self) -> None:
        """Remove everything but the lock; the plan and the list of renames go last, so that this can be repeated."""
        for name in ("parts", "merged"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for path in (self._plan, self._publish):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder: the work is done, or nothing of it is worth keeping."""
        self._empty()
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Let go. A folder without a finished part holds nothing worth keeping and goes."""
        if self._lock_fd >= 0:
            if not self._publish.exists() and next(self.parts.glob("*.part"), None) is None:
                shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock_fd)
            self._lock_fd = -1

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Names of what differs between two identities, e.g. ["inputs", "options.seed"]."""
    names = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names += [f"{key}.{name}" for name in differences(a, b)]
        elif a != b:
            names.append(key)
    return names
