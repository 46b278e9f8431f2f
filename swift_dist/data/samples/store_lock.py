"""One store is made by one process at a time; whoever wants the same one waits, and finds it."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from swift_dist.errors import JobError

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_TRIES = 0.2


class FileLock:
    """A lock that the kernel frees when its holder ends, however it ends. Closed by `close`.

    Args:
        path: of a file that stays; its folder is made.
        waiting: called again and again while another process holds it; what it raises ends the waiting.

    Raises:
        JobError: the file cannot be written to.
    """

    def __init__(self, path: Path, waiting: Callable[[], None]) -> None:
        self._path, self._fd = path, -1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            self._wait(waiting)
        except OSError as error:
            self.close()
            raise JobError(
                "data.cache",
                f"cannot write to {path.parent}: {error.strerror}",
                "give data.cache another folder",
            ) from None
        except BaseException:
            self.close()
            raise

    def _wait(self, waiting: Callable[[], None]) -> None:
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                waiting()
                time.sleep(_SECONDS_BETWEEN_TRIES)
            except OSError as error:  # a file system without locks
                logger.warning("%s cannot be locked (%s): two runs may do the same work", self._path, error.strerror)
                return

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class StoreLock:
    """The right to make the store `key` of a cache, and the place where it grows.

    What a holder that ended early left in `work` is gone on with: part files are whole or not there, and depend on the
    key alone.

    Raises:
        JobError: the cache cannot be written to.
    """

    def __init__(self, cache: Path, key: str) -> None:
        self.target = cache / key
        self.work = cache / f".{key}.work"
        self.parts = self.work / "parts"
        self._told = False
        self._lock = FileLock(cache / f".{key}.lock", self._tell)

    def _tell(self) -> None:
        if not self._told:
            logger.info("another run is encoding the same rows into %s: waiting for it", self.target)
        self._told = True

    def new_folder(self) -> Path:
        """An empty folder in `work`, for the store to be written into."""
        folder = self.work / f"whole.{os.getpid()}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def publish(self, folder: Path) -> None:
        """Give a whole store its name, in place of a damaged one that may have it, and remove what it was made of."""
        if self.target.exists():
            self.target.rename(self.work / f"replaced.{os.getpid()}")
        folder.rename(self.target)
        self.discard()

    def discard(self) -> None:
        """Remove what the store was being made of."""
        shutil.rmtree(self.work, ignore_errors=True)

    def __enter__(self) -> StoreLock:
        return self

    def __exit__(self, *_: object) -> None:
        if not any(self.parts.glob("*.npz")):
            self.discard()
        self._lock.close()
