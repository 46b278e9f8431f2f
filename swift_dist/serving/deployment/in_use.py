"""Converted folders that a deployment's versions need are not deleted while it runs (`sources.made`)."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from swift_dist.errors import RunError
from swift_dist.serving.deployment.changes import Control
from swift_dist.serving.deployment.folder import DeploymentFolder
from swift_dist.serving.sources.made import Holds

# Much less than the time for which a folder stays after it was asked for, so a new version's is held before that ends.
_LOOK_SECONDS = 10.0


class FoldersInUse:
    """Holds, while the block runs, what live and candidate versions, the one to roll back to, and adapters are of.

    Args:
        folder: of the deployment. first: what it begins with.
    """

    def __init__(self, folder: DeploymentFolder, first: Iterable[str]) -> None:
        self._control, self._first, self._holds = Control(folder), list(first), Holds()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="folders in use", daemon=True)

    def __enter__(self) -> FoldersInUse:
        self._holds.hold(self._first)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """What is held is let go with the process, which ends: replicas may be draining."""
        self._stop.set()

    def _look(self) -> None:
        while not self._stop.wait(_LOOK_SECONDS):
            try:
                models = self._control.ask("GET", "/control/status")["models"]
            except (RunError, OSError, ValueError):  # its controller is being replaced: what is held stays
                continue
            self._holds.hold(folder for model in models for folder in folders_of(model))


def folders_of(model: dict[str, Any]) -> list[str]:
    """What a model needs, as `/control/status` shows it."""
    needed = [
        version["path"]
        for version in model["versions"]
        if version["role"] in ("live", "candidate") or version["id"] == model["previous"]
    ]
    return [*needed, *model["adapters"].values()]
