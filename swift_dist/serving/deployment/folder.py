"""The folder of a deployment: what runs, where it is reached, what it is to be. Other commands find it there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from swift_dist.errors import JobError
from swift_dist.serving.deployment.desired import ModelState

PARENT = Path("runs")


class DeploymentFolder:
    """Files of one deployment.

    deployment.json (host, pid, address, control, state), state.json (models and versions), admin_token (mode 0600),
    lock (held while it runs), logs/.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self._lock: IO[str] | None = None

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def front(self) -> Path:
        """The front's own folder."""
        return self.path / "front"

    @property
    def token_path(self) -> Path:
        return self.path / "admin_token"

    def exists(self) -> bool:
        return (self.path / "deployment.json").is_file()

    def claim(self) -> None:
        """Make the folder and hold it until this process ends.

        Raises:
            JobError: another process serves from it.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise JobError(
                "output", f"a deployment runs in {self.path}", "--output another folder, or --stop first"
            ) from None

    def runs(self) -> bool:
        """Whether its process is alive."""
        try:
            with (self.path / "lock").open("r") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def write(self, **fields: Any) -> None:
        """Change fields of deployment.json."""
        known = self.read() if self.exists() else {}
        _replace(self.path / "deployment.json", json.dumps({**known, **fields}, indent=2) + "\n")

    def read(self) -> dict[str, Any]:
        return json.loads((self.path / "deployment.json").read_text(encoding="utf-8"))

    def write_state(self, models: Sequence[ModelState]) -> None:
        """What the deployment is to be; whole or not at all, also when the machine loses power."""
        _replace(
            self.path / "state.json", json.dumps({"models": [m.model_dump() for m in models]}, indent=2), sync=True
        )

    def forget_state(self) -> None:
        """An earlier deployment of this folder is not gone on with."""
        (self.path / "state.json").unlink(missing_ok=True)
        (self.path / "deployment.json").unlink(missing_ok=True)

    def read_state(self) -> list[ModelState] | None:
        """What was written last; None before that."""
        try:
            text = (self.path / "state.json").read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        return [ModelState.model_validate(model) for model in json.loads(text)["models"]]

    def make_token(self) -> str:
        """A new admin token, which only this user can read."""
        token = secrets.token_urlsafe(32)
        with contextlib.suppress(FileNotFoundError):
            self.token_path.unlink()
        with os.fdopen(os.open(self.token_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(token)
        return token

    def token(self) -> str:
        return self.token_path.read_text(encoding="utf-8").strip()


def _replace(path: Path, text: str, sync: bool = False) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    part.replace(path)


def default_folder() -> Path:
    return PARENT / time.strftime("deploy-%Y%m%d-%H%M%S")


def running_folder(output: str | None) -> DeploymentFolder:
    """The deployment in folder `output`, else the newest one that runs below ``runs/``.

    Raises:
        JobError: nothing runs there.
    """
    if output is not None:
        folder = DeploymentFolder(output)
        if not folder.exists() or not folder.runs():
            raise JobError("output", f"no deployment runs in {output}", "name the folder that its start printed")
        return folder
    folders = [DeploymentFolder(file.parent) for file in PARENT.glob("*/deployment.json")]
    running = [folder for folder in folders if folder.runs()]
    if not running:
        raise JobError(
            "output", f"no deployment runs below {PARENT.absolute()}", "name its folder: --output runs/deploy-..."
        )
    return max(running, key=lambda folder: folder.read().get("started", 0))
