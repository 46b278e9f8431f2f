"""One store is made by one process at a time; whoever wants the same one waits, and finds it."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from pathlib import Path

from swift_dist.errors import JobError

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_TRIES = 0.2


class StoreLock:
    """The right to make the store `key` of a cache, and the place where it grows.

    The kernel frees the lock when its holder ends, however it ends. What such a one left in `work` is gone on with:
    part files are whole or not there, and depend on the key alone.

    Raises:
        JobError: the cache cannot be written to.
    """

    def __init__(self, cache: Path, key: str) -> None:
        self.target = cache / key
        self.work = cache / f".{key}.work"
        self.parts = self.work / "parts"
        self._path, self._fd = cache / f".{key}.lock", -1
        try:
            cache.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            self._wait()
        except OSError as error:
            self._close()
            raise JobError(
                "data.cache",
                f"cannot write to {cache}: {error.strerror}",
                "give data.cache another folder",
            ) from None
        except BaseException:
            self._close()
            raise

    def _wait(self) -> None:
        told = False
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if not told:
                    logger.info("another run is encoding the same rows into %s: waiting for it", self.target)
                told = True
                time.sleep(_SECONDS_BETWEEN_TRIES)
            except OSError as error:  # a file system without locks
                logger.warning("%s cannot be locked (%s): two runs may do the same work", self._path, error.strerror)
                return

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

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> StoreLock:
        return self

    def __exit__(self, *_: object) -> None:
        if not any(self.parts.glob("*.npz")):
            self.discard()
        self._close()
