"""`swift-dist deploy` as a process, for tests: started, asked, watched for what it leaves behind."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ports import free_port

from swift_dist.serving.deployment.changes import Control
from swift_dist.serving.deployment.folder import DeploymentFolder

SUPPORT = Path(__file__).parent
_MARK = "SWIFT_DIST_TEST_DEPLOYMENT"


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)
    return result


class Deployment:
    """A running `swift-dist deploy`. Leaving the block stops it and checks that no process of it is left.

    Args:
        folder: of the deployment. words: its keys. variables: of its environment, and of commands about it.
    """

    def __init__(self, folder: Path, *words: str, variables: Mapping[str, str] | None = None) -> None:
        self._variables = dict(variables or {})
        self.folder, self.port = DeploymentFolder(folder), free_port()
        self.mark = secrets.token_hex(8)
        self._stderr = folder.with_suffix(".stderr")
        command = [sys.executable, "-m", "swift_dist.cli", "deploy", *words]
        command += ["--port", str(self.port), "--output", str(folder)]
        paths = [str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])]
        own = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", _MARK: self.mark, **self._variables}
        environment = {**os.environ, **own}
        environment.pop("RAY_ADDRESS", None)
        with self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def wait_ready(self, seconds: float = 240.0) -> Deployment:
        def ready() -> bool:
            assert self.process.poll() is None, self.stderr
            return self.folder.exists() and self.folder.read()["state"] == "ready"

        wait_until(ready, seconds, f"ready; it says\n{self.stderr}")
        return self

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The control API."""
        return Control(self.folder).ask(method, path, body)

    def status(self) -> dict[str, Any]:
        return self.ask("GET", "/control/status")

    def replicas(self, version: str | None = None) -> list[dict[str, Any]]:
        """Those that answer."""
        found = [r for r in self.status()["replicas"] if r["state"] == "ready"]
        return [r for r in found if version in (None, r["version"])]

    def engine_pids(self, replica: dict[str, Any]) -> list[int]:
        """The engine's processes of a replica, without their guard."""
        from swift_dist.lifetime import descendants

        return descendants(replica["pids"][1])

    def wait_for(self, count: int, version: str, seconds: float = 150.0) -> list[dict[str, Any]]:
        """Until `count` replicas of a version answer."""
        return wait_until(
            lambda: (found := self.replicas(version)) and len(found) == count and found, seconds, f"{count} replicas"
        )

    def change(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`swift-dist deploy WORDS` about this deployment."""
        command = [sys.executable, "-m", "swift_dist.cli", "deploy", *words, "--output", str(self.folder.path)]
        environment = {**os.environ, "PYTHONPATH": str(SUPPORT), **self._variables}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)

    def pids_of(self, title: bytes) -> list[int]:
        """Its processes whose command line begins with `title`, as Ray titles its actors."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                ours = f"{_MARK}={self.mark}".encode() in (entry / "environ").read_bytes()
                if ours and (entry / "cmdline").read_bytes().startswith(title):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def processes(self) -> list[str]:
        """Command lines of all that were started for it, whoever their parents are now."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and f"{_MARK}={self.mark}".encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return [line for line in found if line]

    def stop(self, number: int = signal.SIGTERM, seconds: float = 90.0) -> dict[str, Any]:
        """End it in order; what it printed with --json, else nothing."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=seconds)
        return json.loads(out) if out.startswith("{") else {}

    def __enter__(self) -> Deployment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.stop()
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.communicate()
        if error is None:
            wait_until(lambda: not self.processes(), 30, f"no process left: {self.processes()}")
