"""What is asked of a deployment that runs, through its control API: updates, adapters, status, stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_dist.errors import JobError, RunError
from swift_dist.serving.deployment.adapters import said
from swift_dist.serving.deployment.folder import DeploymentFolder, running_folder
from swift_dist.serving.options import EngineOptions, ServedModel
from swift_dist.serving.sources.source import ADAPTER_NAME

if TYPE_CHECKING:
    from swift_dist.serving.deploy import DeployOptions

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.3
_AWAY_SECONDS = 60.0  # of a controller that Ray starts again
_LATER = "--status shows it, --rollback withdraws an update"


class NoAnswerError(RunError):
    """The controller is not there: it may be on its way back."""


class Control:
    """The control API of a running deployment, with its admin token."""

    def __init__(self, folder: DeploymentFolder) -> None:
        self.folder = folder
        logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request, else

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Raises RunError where it refuses, NoAnswerError where it is not there."""
        import httpx

        known = self.folder.read()
        if "control" not in known:
            raise RunError("the deployment has only begun to start", "try again when it is ready")
        headers = {"Authorization": f"Bearer {self.folder.token()}"}
        try:
            answer = httpx.request(
                method, known["control"] + path, json=body, headers=headers, timeout=300.0, trust_env=False
            )
        except httpx.HTTPError as error:
            raise NoAnswerError(f"the deployment does not answer: {type(error).__name__}: {error}", "") from error
        if answer.status_code != 200:
            raise RunError(said(answer), "")
        return answer.json()


def status(options: DeployOptions) -> dict[str, Any]:
    """`--status`."""
    folder = running_folder(options.output)
    known = folder.read()
    return {"folder": str(folder.path), "address": known["address"], **Control(folder).ask("GET", "/control/status")}


def stop(options: DeployOptions) -> dict[str, Any]:
    """`--stop`: returns when nothing of it runs."""
    folder = running_folder(options.output)
    Control(folder).ask("POST", "/control/stop")
    with _patience(options.wait_timeout, f"{folder.path} goes on being stopped") as wait:
        while folder.runs():
            wait()
    return {"folder": str(folder.path), "message": f"stopped {folder.path}"}


def update(options: DeployOptions) -> dict[str, Any]:
    """`--update NEW [--canary SHARE]`: returns when it answers requests, or has failed."""
    from swift_dist.serving.sources.source import resolve_options

    folder = running_folder(options.output)
    engine_options = deployed_options(folder)
    assert options.update
    source = resolve_options(
        options.model_copy(update={"model": options.update}),
        trust_remote_code=engine_options.trust_remote_code,
        task=engine_options.task,
    )
    if source.adapters:
        raise JobError(
            "update",
            f"{options.update} is an adapter",
            "--load_adapter NAME=DIR beside the model, or --merge_lora true for a model of both",
        )
    check_new_version(folder, source.path)
    control = Control(folder)
    body = {"source": options.update, "path": source.path, "share": options.canary or 1.0, "surge": options.surge}
    model = control.ask("POST", "/control/update", {**body, "model": options.served_model_name})
    return settle_change(control, model, model["versions"][-1]["id"], options.wait_timeout)


def check_new_version(folder: DeploymentFolder, path: str) -> None:
    """Raises JobError where the deployment's engine cannot serve the model in `path`."""
    from swift_dist.serving.engines.choose import find_engine

    known = folder.read()
    engine = find_engine(known["engine"])
    engine.check(ServedModel("new", path, deployed_options(folder), {}, known["use_gpu"]))


def deployed_options(folder: DeploymentFolder) -> EngineOptions:
    """The engine's keys of a deployment."""
    given = folder.read()["options"]
    return EngineOptions.model_validate({name: given[name] for name in EngineOptions.model_fields})


def promote(options: DeployOptions) -> dict[str, Any]:
    """`--promote`: returns when the canary answers everything."""
    control = Control(running_folder(options.output))
    model = control.ask("POST", "/control/promote", {"model": options.served_model_name, "surge": options.surge})
    return settle_change(control, model, _candidate(model), options.wait_timeout)


def rollback(options: DeployOptions) -> dict[str, Any]:
    """`--rollback`: returns when the version before answers everything."""
    control = Control(running_folder(options.output))
    model = control.ask("POST", "/control/rollback", {"model": options.served_model_name, "surge": options.surge})
    live = next(version["id"] for version in model["versions"] if version["role"] == "live")
    return settle_change(control, model, _candidate(model) or live, options.wait_timeout)


def _candidate(model: dict[str, Any]) -> str | None:
    return next((version["id"] for version in model["versions"] if version["role"] == "candidate"), None)


def settle_change(
    control: Control, model: dict[str, Any], version_id: str | None, seconds: float | None = None
) -> dict[str, Any]:
    """Wait until a version answers: everything, or its canary's share. Says meanwhile how far it is.

    Args:
        seconds: to wait at most (None: however long it takes).

    Raises:
        RunError: it failed, and the version before goes on; or it is not done in time, and goes on.
        KeyboardInterrupt: interrupted; it goes on.
    """
    said, heard = "", time.monotonic()
    with _patience(seconds, f"{version_id} goes on being deployed") as wait:
        while True:
            try:
                now = control.ask("GET", "/control/status")
            except NoAnswerError:
                if time.monotonic() - heard > _AWAY_SECONDS:
                    raise
                wait()
                continue
            heard = time.monotonic()
            model = next(m for m in now["models"] if m["name"] == model["name"])
            version = next((v for v in model["versions"] if v["id"] == version_id), None)
            if version is None or version["role"] == "failed":
                live = next((v["id"] for v in model["versions"] if v["role"] == "live"), "nothing")
                message = version["message"] if version else "it was withdrawn"
                raise RunError(f"{version_id} failed, {live} goes on: {message}", "")
            if version["role"] == "retired":
                raise RunError(f"{version_id} was rolled back", "")
            is_canary = version["role"] == "candidate" and version["share"] and version["goal"] < 1
            if now["in_force"] and (is_canary or (version["role"] == "live" and not _candidate(model))):
                part = f"{version['share']:.0%} of" if is_canary else "all"
                message = f"{version_id} answers {part} requests"
                return {"model": model["name"], "version": version_id, "message": message}
            if (progress := _progress(now, version)) != said:
                said = progress
                log.info("%s", said)
            wait()


def _progress(status: dict[str, Any], version: dict[str, Any]) -> str:
    """How far a version is, in words."""
    ready = sum(r["version"] == version["id"] and r["state"] == "ready" for r in status["replicas"])
    share = f", {version['share']:.0%} of the requests" if version["share"] else ""
    return f"{version['id']}: {ready} of {version['num_replicas']} replicas answer{share}"


@contextmanager
def _patience(seconds: float | None, goes_on: str) -> Iterator[Callable[[], None]]:
    """What to call between two looks at something that goes on without whoever waits for it.

    Args:
        seconds: after which the call raises RunError (None: never).
        goes_on: what does, in words, for that error and for an interruption.
    """
    deadline = None if seconds is None else time.monotonic() + seconds

    def wait() -> None:
        if deadline is not None and time.monotonic() > deadline:
            raise RunError(f"{goes_on}: it was not done within {seconds:g} s", _LATER)
        time.sleep(_POLL_SECONDS)

    try:
        yield wait
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{goes_on}: only this command has ended. {_LATER}") from None


def load_adapter(options: DeployOptions) -> dict[str, Any]:
    """`--load_adapter name=DIR`: on every replica, or none."""
    name, equals, path = (options.load_adapter or "").partition("=")
    if not equals or not ADAPTER_NAME.fullmatch(name):
        raise JobError("load_adapter", f"{options.load_adapter!r} is not name=DIR", "--load_adapter poems=runs/poems")
    control = Control(running_folder(options.output))
    body = {"lora_name": name, "lora_path": str(Path(path).absolute()), "model": options.served_model_name}
    return {**control.ask("POST", "/v1/load_lora_adapter", body), "message": f"{name} is loaded"}


def unload_adapter(options: DeployOptions) -> dict[str, Any]:
    """`--unload_adapter name`."""
    control = Control(running_folder(options.output))
    answer = control.ask("POST", "/v1/unload_lora_adapter", {"lora_name": options.unload_adapter})
    return {**answer, "message": f"{options.unload_adapter} is unloaded"}
