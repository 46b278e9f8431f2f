"""Folders that are made of other folders once and kept: converted checkpoints, merged adapters."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from swift_dist import __version__
from swift_dist.errors import JobError

log = logging.getLogger(__name__)

_CACHE = Path(".cache") / "serving"


def made_once(
    name: str,
    sources: Iterable[Path],
    options: Mapping[str, Any],
    make: Callable[[Path], object],
    cache: Path | None,
    what: str,
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

    Raises:
        JobError: the cache cannot be written. Whatever `make` raises.
    """
    sources = [source.absolute() for source in sources]
    identity = {"version": __version__, "options": dict(options), "files": [facts(source) for source in sources]}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
    root = (cache or beside(sources[0])).absolute()
    folder = root / f"{name}-{digest}"
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root / f".{folder.name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise JobError("cache", f"{root} cannot be written: {error.strerror}", "name another folder: --cache") from None
    try:
        _wait_for(descriptor, folder)
        if not folder.is_dir():
            log.info("%s -> %s", what, folder)
            began = time.monotonic()
            make(folder)
            log.info("made in %.1f s; found there from now on", time.monotonic() - began)
    finally:
        os.close(descriptor)
    return folder


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
