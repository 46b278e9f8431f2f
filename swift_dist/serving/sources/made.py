"""Folders that are made of other folders once and kept: converted checkpoints, merged adapters.

NAME-DIGEST/         such a folder; it appears when it is whole
.NAME-DIGEST.lock    held (flock) by the process that makes it
.NAME-DIGEST.used    held, shared, by each process that serves it; its text says of what it is, its time when it was
                     asked for last

A newer conversion of the same source ends older ones that nobody uses (`_prune`).
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from swift_dist import __version__
from swift_dist.errors import JobError

log = logging.getLogger(__name__)

_CACHE = Path(".cache") / "serving"
_KEPT = 2  # conversions of a source that stay beside the newest
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
_QUIET_SECONDS = 600.0  # for so long after it was asked for a folder stays in any case


def made_once(
    name: str,
    sources: Iterable[Path],
    options: Mapping[str, Any],
    make: Callable[[Path], object],
    cache: Path | None,
    what: str,
    series: str,
) -> Path:
    """The folder that `make` writes of `sources`: found if it was made before of the same files, else made now.

    Of two processes that want the same one, one makes it and the other waits.

    Args:
        name: what the folder's name begins with.
        sources: folders and files: their paths, sizes and times of change tell them apart from others.
        options: whatever else the content depends on.
        make: writes the folder that it is given, which appears when it is whole.
        cache: the folder of such folders (None: `beside` the first source).
        what: is being made, for people.
        series: the same for all conversions of one source, of which older ones may be deleted.

    Raises:
        JobError: the cache cannot be written. Whatever `make` raises.
    """
    sources = [source.absolute() for source in sources]
    identity = {"version": __version__, "options": dict(options), "files": [facts(source) for source in sources]}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
    root = (cache or beside(sources[0])).absolute()
    folder = root / f"{name}-{digest}"
    if _is_there(folder):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root / f".{folder.name}.lock", _FLAGS, 0o644)
    except OSError as error:
        raise JobError("cache", f"{root} cannot be written: {error.strerror}", "name another folder: --cache") from None
    try:
        _wait_for(descriptor, folder)
        if not _is_there(folder):
            for left_over in root.glob(f".{glob.escape(folder.name)}.*/"):  # of a process that was killed as it made it
                shutil.rmtree(left_over, ignore_errors=True)
            _used(folder).write_text(series, encoding="utf-8")
            log.info("%s -> %s", what, folder)
            began = time.monotonic()
            make(folder)
            os.utime(_used(folder))
            log.info("made in %.1f s; found there from now on", time.monotonic() - began)
            _prune(folder, series)
    finally:
        os.close(descriptor)
    return folder


def series_of(folder: Path) -> str:
    """What `made_once` was told of a folder that it made; of another folder its path."""
    try:
        return _used(folder).read_text(encoding="utf-8")
    except OSError:
        return str(folder.absolute())


@contextmanager
def in_use(*folders: str | Path) -> Iterator[None]:
    """Those of the folders that `made_once` made stay while the block runs."""
    holds = Holds()
    holds.hold(folders)
    try:
        yield
    finally:
        holds.hold(())


class Holds:
    """Folders that this process uses: of those that `made_once` made none is deleted meanwhile."""

    def __init__(self) -> None:
        self._held: dict[str, int] = {}

    def hold(self, folders: Iterable[str | Path]) -> None:
        """Hold these from now on, and no others."""
        wanted = {str(folder) for folder in folders}
        for folder in wanted - self._held.keys():
            with suppress(OSError):  # not one of ours, or a file system without locks
                self._held[folder] = _share(Path(folder))
        for folder in self._held.keys() - wanted:
            os.close(self._held.pop(folder))


def _share(folder: Path) -> int:
    """A descriptor that holds a folder. Raises OSError where `made_once` did not make it."""
    descriptor = os.open(_used(folder), os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _used(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.used")


def _is_there(folder: Path) -> bool:
    """Whether a folder was made; if so it stays for a while, for whoever asks."""
    try:
        descriptor = _share(folder)  # nobody deletes it now
    except OSError:
        return folder.is_dir()
    try:
        if folder.is_dir():
            with suppress(OSError):  # another user's
                os.utime(descriptor)
        return folder.is_dir()
    finally:
        os.close(descriptor)


def _prune(newest: Path, series: str) -> None:
    """Delete older folders of a series, but for the last few, those in use, and those that were asked for lately."""
    root = newest.parent
    for left_over in root.glob(".*.deleted/"):
        shutil.rmtree(left_over, ignore_errors=True)
    of_series = []
    for used in root.glob(".*.used"):
        folder = root / used.name.removeprefix(".").removesuffix(".used")
        with suppress(OSError):  # deleted meanwhile, or another user's
            if folder != newest and folder.is_dir() and used.read_text(encoding="utf-8") == series:
                of_series.append((used.stat().st_mtime, folder))
    for _, folder in sorted(of_series)[:-_KEPT]:
        with suppress(OSError):  # in use (BlockingIOError), no locks here, or it is not ours to delete
            _delete_unused(folder)


def _delete_unused(folder: Path) -> None:
    """Raises OSError where it is used, was asked for lately, or cannot be deleted."""
    descriptor = os.open(_used(folder), os.O_RDWR | os.O_CLOEXEC)
    gone = folder.with_name(f".{folder.name}.{os.getpid()}.deleted")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if time.time() - os.fstat(descriptor).st_mtime < _QUIET_SECONDS:
            return
        folder.rename(gone)
    finally:
        os.close(descriptor)
    shutil.rmtree(gone, ignore_errors=True)
    log.info("%s is deleted: newer conversions are there, and nobody uses it", folder)


def beside(source: Path) -> Path:
    """``.cache/serving`` beside a folder, or beside the run that it is part of: every node sees it which sees them."""
    if source.parent.parts[-2:] == _CACHE.parts:
        return source.parent
    run = next((folder for folder in list(source.parents)[:2] if (folder / "job.yaml").is_file()), source)
    return run.parent / _CACHE


def _wait_for(descriptor: int, folder: Path) -> None:
    """Hold the lock; says so where another process has it, which may take as long as making the folder."""
    with suppress(OSError):  # a file system without locks: `make` itself is atomic
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is making %s: waiting for it", folder)
            fcntl.flock(descriptor, fcntl.LOCK_EX)


def facts(source: Path, but: Container[Path] = ()) -> list[Any]:
    """What tells a folder's (or file's) content from another's without reading it.

    Args:
        but: files that are left out.
    """
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    stats = [(str(file), file.stat()) for file in files if file not in but]
    return [str(source), [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]]
