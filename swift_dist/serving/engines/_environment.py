"""A virtual environment of an engine's own, in the user's cache folder, for packages that do not fit with ours."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swift_dist.errors import RunError

_TAIL_LINES = 15


class OwnEnvironment:
    """One package and what it requires, in a virtual environment.

    Args:
        package: name on the index.
        version: exactly this one; another version gets another folder.
    """

    def __init__(self, package: str, version: str) -> None:
        self.package, self.version = package, version

    @property
    def folder(self) -> Path:
        """``$XDG_CACHE_HOME/swift_dist/<package>-<version>``, or below ``~/.cache``."""
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(cache).expanduser() / "swift_dist" / f"{self.package}-{self.version}"

    @property
    def is_complete(self) -> bool:
        """Whether it was installed to the end."""
        return self._stamp.is_file()

    @property
    def _stamp(self) -> Path:
        return self.folder / "complete"

    def program(self, name: str) -> Path:
        """A command of the environment."""
        return self.folder / "bin" / name

    def make(self) -> None:
        """Install the package where it is not there yet. Several processes may ask at once: one installs, others wait.

        One that was interrupted is gone on with: pip keeps what it has downloaded, and installs over what there is.

        Raises:
            RunError: it cannot be installed, with the last lines of what pip said.
        """
        if self.is_complete:
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder.with_suffix(self.folder.suffix + ".lock")):
            if self.is_complete:  # by whoever held the lock
                return
            self._run("venv", [sys.executable, "-m", "venv", str(self.folder)])
            wanted = f"{self.package}=={self.version}"
            self._run("pip", [str(self.program("python")), "-m", "pip", "install", "--progress-bar", "off", wanted])
            self._stamp.write_text(f"{wanted}\n")

    def _run(self, what: str, command: list[str]) -> None:
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=variables
        )
        if done.returncode:
            said = "\n  ".join(done.stdout.splitlines()[-_TAIL_LINES:])
            raise RunError(
                f"The environment of {self.package} {self.version} cannot be made: {what} failed.\n  {said}",
                f"It is installed into {self.folder} on first use, which needs a package index (PIP_INDEX_URL) or a "
                f"folder of wheels (PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER); start again to go on.",
            )


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Held by one process or thread at a time; the kernel lets go of it when its holder dies."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
