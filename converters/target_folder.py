"""A folder that appears when it is complete, and whose making goes on after any interruption with whole files only.

.NAME.partial/           beside the target, until it gets the target's name
    .lock                held by the process that works on it
    .plan.json           what the work is for: another command does not go on with it
    .written.jsonl       one line for each file that is whole and on the disk, with what was seen of it
    <files>

The three go when the folder has its name. A kill in that instant leaves them there; nothing reads them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from swift_dist.errors import JobError, RunError

_LOCK, _PLAN, _WRITTEN = ".lock", ".plan.json", ".written.jsonl"
_AGAIN = "repeat the command: it goes on where it was"


def check_target(target: Path) -> None:
    """Raises JobError where something of that name exists already."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise JobError("target", f"{target} exists", "name a folder that does not exist yet, or remove it")


class TargetFolder:
    """The work folder of one target, held by one process at a time.

    Args:
        target: the folder that is going to appear.
        identity: everything that its content depends on.

    Attributes:
        path: where the files are written.
        written: of the files that are whole, those of an earlier run too: what `record` was given, by file name.

    Raises:
        JobError: the target exists, another process works on it, or an interrupted run of another command left its
            work there.
    """

    def __init__(self, target: Path, identity: Mapping[str, Any]) -> None:
        self.target = target.absolute()
        check_target(self.target)
        self.path = self.target.with_name(f".{self.target.name}.partial")
        self.written: dict[str, dict[str, Any]] = {}
        self._lock_fd = -1
        try:
            self._lock()
            self._begin(json.loads(json.dumps(identity)))
        except OSError as error:
            self.close()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise disk_full(error) from None
            raise JobError("target", f"cannot write to {self.path.parent}: {error}", "give another target") from None
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            self._flock(descriptor)
            with suppress(FileNotFoundError):
                if os.fstat(descriptor).st_ino == (self.path / _LOCK).stat().st_ino:
                    break
            os.close(descriptor)  # its holder has removed the folder meanwhile
        self._lock_fd = descriptor
        check_target(self.target)  # it may have appeared between the first look and the lock

    def _flock(self, descriptor: int) -> None:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)  # nothing here is ours: `close` must leave it alone
                raise JobError(
                    "target", f"another conversion is writing {self.target}", "wait for it, or give another target"
                ) from None

    def _begin(self, identity: dict[str, Any]) -> None:
        plan = self.path / _PLAN
        found = None
        with suppress(OSError, ValueError):
            found = json.loads(plan.read_text())
        resumable = (self.path / _WRITTEN).is_file()
        if resumable and found is not None and found != identity:
            differing = sorted(key for key in {*found, *identity} if found.get(key) != identity.get(key))
            raise JobError(
                "target",
                f"{self.path} holds an interrupted conversion that differs in {', '.join(differing)}",
                f"repeat that command to finish it, or remove {self.path}",
            )
        if not resumable or found is None:
            self._clear()  # no file is whole, or nobody knows of what: another command may have begun them
            plan.write_text(json.dumps(identity))
        with suppress(OSError):
            for line in (self.path / _WRITTEN).read_text().splitlines():
                with suppress(ValueError, KeyError, TypeError):  # the last line may be half written
                    entry = json.loads(line)
                    if (self.path / entry["file"]).stat().st_size == entry["size"]:
                        self.written[entry["file"]] = entry["facts"]

    def _clear(self) -> None:
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != _LOCK:
                path.unlink()

    def create(self, files: Iterable[tuple[str, int]]) -> None:
        """Make files with their final size, all zeros; whatever an interrupted run left under their names is dropped.

        Raises:
            RunError: the disk has no room for them.
        """
        files = tuple(files)
        stats = shutil.disk_usage(self.path)
        needed = sum(size for _, size in files)
        for name, _ in files:
            with suppress(FileNotFoundError):
                stats = stats._replace(free=stats.free + (self.path / name).stat().st_blocks * 512)
        if stats.free < needed:
            raise RunError(
                f"the disk is full: {self.path.parent} has {stats.free / 2**30:.2f} GiB free, "
                f"{needed / 2**30:.2f} are needed",
                f"free space and {_AGAIN}",
            )
        try:
            for name, size in files:
                path = self.path / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as stream:
                    stream.truncate(size)
        except OSError as error:
            raise as_run_error(error) from None

    def record(self, file: str, facts: Mapping[str, Any]) -> None:
        """Note that a file is whole, once its bytes are on the disk.

        Raises:
            RunError: the disk does not take them.
        """
        try:
            sync(self.path / file)
            entry = {"file": file, "size": (self.path / file).stat().st_size, "facts": facts}
            with (self.path / _WRITTEN).open("a") as stream:
                stream.write(json.dumps(entry) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            self.written[file] = dict(facts)
        except OSError as error:
            raise as_run_error(error) from None

    def publish(self, small: Iterable[str]) -> None:
        """Give the folder its name. `small`: files that were written without `record`; others are leftovers, and go.

        Raises:
            RunError: the target has appeared meanwhile, or the disk is full.
        """
        try:
            small = set(small)
            known = {*small, *self.written, _LOCK, _PLAN, _WRITTEN}
            for path in [path for path in self.path.rglob("*") if not path.is_dir()]:
                if path.relative_to(self.path).as_posix() not in known:
                    path.unlink()
            for name in small:
                sync(self.path / name)
            for folder in [*(path for path in self.path.rglob("*") if path.is_dir()), self.path]:
                sync(folder)
            with suppress(FileNotFoundError):
                self.target.rmdir()  # an empty folder may be there
            self.path.rename(self.target)
            # Not before: a run that is killed until then goes on with every file, and nobody else takes up the work.
            for name in (_WRITTEN, _PLAN, _LOCK):
                (self.target / name).unlink(missing_ok=True)
            for folder in (self.target, self.target.parent):
                sync(folder)
        except OSError as error:
            raise as_run_error(error) from None

    def close(self) -> None:
        """Let go. A folder in which no file was finished holds nothing worth keeping, and goes."""
        if self._lock_fd < 0:
            return
        kept = self.path / _WRITTEN
        if self.path.exists() and not kept.exists():
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock_fd)
        self._lock_fd = -1

    def discard(self) -> None:
        """Remove the work: it is not to be gone on with."""
        shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> TargetFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sync(path: Path) -> None:
    """Force a file or a folder's names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_full(error: object) -> RunError:
    return RunError(f"the disk is full: {error}", f"free space and {_AGAIN}")


def as_run_error(error: OSError) -> RunError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full(error)
    return RunError(f"cannot write: {error}", _AGAIN)
