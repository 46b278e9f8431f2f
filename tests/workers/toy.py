"""A task for the tests of `swift_dist.workers`: a unit is a word and what it is about."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift_dist.errors import JobError, RunError


class Odd:
    """Can be pickled, but not understood."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("odd",)


@dataclass(frozen=True)
class Toy:
    """Attributes: fails: whether it cannot start; weight: makes the task itself large."""

    fails: bool = False
    weight: bytes = b""

    def start(self) -> Callable[[tuple[str, Any]], Any]:
        if self.fails:
            raise JobError("toy.fails", "the toy cannot start", "leave it out")
        return lambda unit: getattr(self, unit[0])(unit[1])

    def square(self, x: int) -> int:
        print("what a library prints is no result")
        return x * x

    def nothing(self, x: int) -> None:
        return None

    def who(self, seconds: float) -> int:
        time.sleep(seconds)
        return os.getpid()

    def about(self, what: Any) -> dict[str, Any]:
        loaded = [name for name in ("numpy", "torch", "ray") if name in sys.modules]
        return {"loaded": loaded, "threads": os.environ["OMP_NUM_THREADS"], "session": os.getsid(0) == os.getpid()}

    def job_error(self, key: str) -> None:
        raise JobError(key, "is wrong", "correct it")

    def run_error(self, text: str) -> None:
        raise RunError(text, "do something")

    def full(self, path: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def over_quota(self, path: str) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), path)

    def read(self, path: str) -> bytes:
        return Path(path).read_bytes()

    def bug(self, x: int) -> float:
        return x / 0

    def lock(self, x: int) -> Any:
        return threading.Lock()  # cannot be pickled

    def end(self, code: int) -> None:
        os._exit(code)

    def sleep_in(self, path: str) -> None:
        """Leave a file that says who sleeps here."""
        (Path(path) / str(os.getpid())).touch()
        time.sleep(600)
