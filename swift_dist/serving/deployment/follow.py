"""`--follow`: each new checkpoint of a training run replaces the model that is served.

A run's ``checkpoints/latest`` names a checkpoint that is whole; once the run is done, what it exported is deployed.
What cannot be converted or served is skipped with a message; nothing is evaluated. Checkpoints that appear while one is
being deployed are passed over for the newest.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_dist.config.section import updated
from swift_dist.errors import JobError, RunError
from swift_dist.runs.folder import RunFolder
from swift_dist.runs.outcome import exported
from swift_dist.serving.deployment.changes import Control, check_new_version, settle_change, task_of_update
from swift_dist.serving.deployment.folder import DeploymentFolder
from swift_dist.serving.deployment.scaling import parse_bounds
from swift_dist.serving.options import EngineOptions
from swift_dist.serving.sources.source import Source, resolve_model

if TYPE_CHECKING:
    from swift_dist.serving.deploy import DeployOptions
    from swift_dist.serving.deployment.plan import Plan

_POLL_SECONDS = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """Weights of a run: a checkpoint's folder, or with `is_final` the run's own, which stands for what it exported.

    Attributes:
        step: the checkpoint that is the newest.
    """

    folder: Path
    step: str
    is_final: bool = False


def newest_weights(run: Path) -> Weights | None:
    """The newest of a run: its export once it is done, else its newest whole checkpoint; None before the first."""
    try:
        step = (run / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    except OSError:
        step = ""
    folder = RunFolder(run)
    status = folder.status()
    if status is not None and status.state == "done" and exported(folder):
        return Weights(run, step, is_final=True)
    checkpoint = run / "checkpoints" / step
    return Weights(checkpoint, step) if step and checkpoint.is_dir() else None


def _covered(weights: Weights) -> set[Weights]:
    """What need not be deployed after these: of an export also the last checkpoint, which a run that goes on has."""
    return (
        {weights, Weights(weights.folder / "checkpoints" / weights.step, weights.step)}
        if weights.is_final
        else {weights}
    )


def require_run(options: DeployOptions) -> Path:
    """The run that is to be followed.

    Raises:
        JobError: there is no such folder, or its checkpoints could not be deployed.
    """
    run = Path(options.follow or "")
    if not run.is_dir():
        raise JobError("follow", f"there is no folder {run}", "name the --output of a training run")
    least = parse_bounds(options.autoscale).least if options.autoscale else options.replicas
    if options.surge == 0 and least == 1:
        problem = "0 ends a replica before its successor starts, and without the only one nothing would answer"
        raise JobError("surge", problem, "--surge 1, or two replicas or more")
    return run


def resolve_checkpoint(checkpoint: str | Path, options: DeployOptions, keys: EngineOptions) -> Source:
    """The model that a checkpoint holds, converted where it must be. An adapter is merged into its base.

    Args:
        keys: of the engine that is to serve it.
    """
    resolve = functools.partial(
        resolve_model,
        str(checkpoint),
        hf_config=options.hf_config,
        tokenizer=options.tokenizer,
        cache=Path(options.cache) if options.cache else None,
        trust_remote_code=keys.trust_remote_code,
        task=keys.task,
    )
    source = resolve()
    return resolve(merge_lora=True) if source.adapters else source


def first_model(options: DeployOptions, keys: EngineOptions) -> tuple[str, Source]:
    """What a deployment that follows a run begins with: the weights that are the newest, and the model in them.

    Args:
        keys: of the engine that is to serve it.

    Raises:
        JobError: there is no such run, no checkpoint yet, or the newest cannot be served. RunError: nor read.
    """
    run = require_run(options)
    while True:
        newest = newest_weights(run)
        if newest is None:
            remedy = "give --model PATH to serve until the first is there"
            raise JobError("follow", f"{run} has no checkpoint yet", remedy)
        try:
            return str(newest.folder), resolve_checkpoint(newest.folder, options, keys)
        except (JobError, RunError, OSError) as error:
            if newest.folder.is_dir():
                raise
            log.warning("%s was deleted by its run while it was read, which has a newer one: %s", newest.folder, error)


class Follower:
    """A thread that deploys new checkpoints while the block runs."""

    def __init__(self, plan: Plan, folder: DeploymentFolder) -> None:
        assert plan.options.follow
        self._options, self._folder, self._run = plan.options, folder, Path(plan.options.follow)
        self._model = plan.models[0]
        self._control = Control(folder)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow", daemon=True)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()

    def _follow(self) -> None:
        seen, waits = self._first(), None
        while not self._stop.wait(_POLL_SECONDS):
            newest = newest_weights(self._run)
            if newest is None or newest in seen or not self._is_ready():
                continue
            if self._is_taken():
                if newest != waits:
                    log.info("%s waits for another version that is under way", newest.folder)
                waits = newest
                continue
            seen |= _covered(newest)
            try:
                self._deploy(newest.folder)
            except (JobError, RunError, OSError) as error:
                log.warning("%s is skipped: %s", newest.folder, error)
            except Exception:  # the next one may be good
                log.exception("%s is skipped", newest.folder)

    def _is_ready(self) -> bool:
        try:
            return self._folder.read().get("state") == "ready"
        except (OSError, ValueError):
            return False

    def _is_taken(self) -> bool:
        """Whether another update or a canary is under way, or the controller away: an update would be refused."""
        try:
            models = self._control.ask("GET", "/control/status")["models"]
        except RunError:
            return True
        versions = [version for model in models if model["name"] == self._model.name for version in model["versions"]]
        return any(version["role"] == "candidate" for version in versions)

    def _first(self) -> set[Weights]:
        """What the deployment began with: nothing of the run where that is a model beside it."""
        source = Path(self._model.source)
        if self._options.model:
            return set()
        newest = newest_weights(self._run) if source == self._run else Weights(source, source.name)
        served = newest is not None and newest.is_final == (source == self._run)  # else it has gone on meanwhile
        return _covered(newest) if newest and served else set()

    def _deploy(self, checkpoint: Path) -> None:
        began = time.monotonic()
        keys = self._model.options
        source = resolve_checkpoint(checkpoint, self._options, updated(keys, task=task_of_update(keys)))
        check_new_version(self._folder, source, self._model.name)
        body: dict[str, Any] = {"source": str(checkpoint), "path": source.path, "model": self._model.name}
        body["surge"] = self._options.surge
        model = self._control.ask("POST", "/control/update", body)
        settle_change(self._control, model, model["versions"][-1]["id"])
        log.info("%s is deployed, %.1f s after it was seen", checkpoint, time.monotonic() - began)
