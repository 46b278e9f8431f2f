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
from swift_dist.serving.sources.source import ADAPTER_NAME, AskedTask, Source

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
    served_options = deployed_options(folder, options.served_model_name)
    assert options.update
    source = resolve_options(
        options.model_copy(update={"model": options.update}),
        trust_remote_code=served_options.trust_remote_code,
        task=task_of_update(served_options),
    )
    if source.adapters:
        raise JobError(
            "update",
            f"{options.update} is an adapter",
            "--load_adapter NAME=DIR beside the model, or --merge_lora true for a model of both",
        )
    check_new_version(folder, source, options.served_model_name)
    control = Control(folder)
    body = {"source": options.update, "path": source.path, "share": options.canary or 1.0, "surge": options.surge}
    model = control.ask("POST", "/control/update", {**body, "model": options.served_model_name})
    return settle_change(control, model, model["versions"][-1]["id"], options.wait_timeout)


def task_of_update(served_options: EngineOptions) -> AskedTask:
    """What a new version must be able to do. One of text is asked what it is: embeddings would answer no chat."""
    return "embed" if served_options.task == "embed" else "auto"


def check_new_version(folder: DeploymentFolder, source: Source, name: str | None) -> None:
    """Raises JobError where the deployment's engine cannot serve `source` as its model `name` (None: the only one)."""
    from swift_dist.serving.engines.choose import find_engine

    known, served_options = folder.read(), deployed_options(folder, name)
    if source.task != served_options.task:
        problem = f"{source.description} is for embeddings, and the model that it would replace generates text"
        raise JobError("update", problem, "name one that generates, or --served_model_name of a model for embeddings")
    engine = find_engine(known["engine"])
    engine.check(ServedModel("new", source.path, served_options, {}, known["use_gpu"]))


def deployed_options(folder: DeploymentFolder, name: str | None) -> EngineOptions:
    """The engine's keys of a deployment's model; of the only one where no name is given.

    Raises:
        JobError: there is none of that name, or several and no name.
    """
    given = folder.read()["engine_options"]
    if name is None and len(given) > 1:
        raise JobError("served_model_name", f"there are several models: {', '.join(given)}", "say which one is meant")
    if name is not None and name not in given:
        raise JobError("served_model_name", f"no model is called {name!r}", f"one of {', '.join(given)}")
    return EngineOptions.model_validate(given[name or next(iter(given))])


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
    is_asked = version["role"] == "candidate" and version["share"]
    share = f", {version['share']:.0%} of the requests" if is_asked else ""
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
