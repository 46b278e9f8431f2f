"""sha256 of the input, computed by threads of the driver while the workers tokenise."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Sequence
from pathlib import Path

from swift_dist.data.sources import SourceFile
from swift_dist.errors import RunError

_READ = 1 << 20
_THREADS = 4


class InputHashes:
    """Starts at once; `wait` gives the result. `close` ends it early."""

    def __init__(self, files: Sequence[SourceFile]) -> None:
        self._files, self._hashes = files, [""] * len(files)
        self._next: queue.SimpleQueue[SourceFile] = queue.SimpleQueue()
        for file in files:
            self._next.put(file)
        self._stop, self._error = threading.Event(), ""
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(min(_THREADS, len(files)))]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                file = self._next.get_nowait()
            except queue.Empty:
                return
            digest = hashlib.sha256()
            try:
                with Path(file.path).open("rb") as stream:
                    while (block := stream.read(_READ)) and not self._stop.is_set():
                        digest.update(block)
            except OSError as error:
                self._error = f"cannot read {file.name}: {error.strerror}"
                return
            self._hashes[file.index] = digest.hexdigest()

    def wait(self) -> list[str]:
        """One hash per file, in order.

        Raises:
            RunError: a file cannot be read, or is not any more what it was when the run began.
        """
        for thread in self._threads:
            thread.join()
        if self._error:
            raise RunError(self._error)
        for file in self._files:
            stat = Path(file.path).stat()
            if (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns):
                raise RunError(f"{file.name} changed while it was read", "repeat the command with --overwrite true")
        return self._hashes

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
