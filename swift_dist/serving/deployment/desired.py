"""What a deployment is to be: models, their versions, and what each event makes of them. Pure values and functions.

A model has one version that is *live*. An update makes a *candidate* beside it, which gets its share of the requests
once all its replicas are ready: all of them (then it is live, and the former one retired but remembered), or a canary's
part, until it is promoted or rolled back. A candidate that cannot start has *failed*, and nothing else changes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from swift_dist.config.section import Section, updated
from swift_dist.serving.front.state import Replica, Route, Version


class Refused(ValueError):
    """A change that does not fit what is there; the message says why."""


class VersionState(Section):
    """One version of a model.

    Attributes:
        id: unique in the deployment, never used again.
        source: what the user named; path: the Hugging Face folder that it became.
        role: what it is for now.
        share: of the model's requests that a candidate gets now; goal: once it is ready.
        num_replicas: that are wanted.
        message: why it failed.
    """

    id: str
    source: str
    path: str
    role: Literal["live", "candidate", "retired", "failed"]
    share: float = 0.0
    goal: float = 1.0
    num_replicas: int = 1
    message: str = ""


class ModelState(Section):
    """A model: its versions, oldest first, and its adapters (name -> PEFT folder), which every version has.

    Attributes:
        previous: the version that was live before; a rollback returns to it.
        num_made: versions there ever were.
    """

    name: str
    versions: tuple[VersionState, ...] = ()
    adapters: dict[str, str] = Field(default_factory=dict)
    previous: str | None = None
    num_made: int = 0

    def version(self, version_id: str) -> VersionState | None:
        return next((v for v in self.versions if v.id == version_id), None)

    def _of(self, role: str) -> VersionState | None:
        return next((v for v in self.versions if v.role == role), None)

    @property
    def live(self) -> VersionState | None:
        return self._of("live")

    @property
    def candidate(self) -> VersionState | None:
        return self._of("candidate")


def _with(model: ModelState, version: VersionState, **changes: object) -> ModelState:
    """`model` with fields of one of its versions changed."""
    versions = tuple(updated(v, **changes) if v.id == version.id else v for v in model.versions)
    return updated(model, versions=versions)


def propose(model: ModelState, source: str, path: str, num_replicas: int, share: float = 1.0) -> ModelState:
    """A new version is to get `share` of the requests once `num_replicas` of it are ready.

    Raises:
        Refused: another one is under way.
    """
    _require_no_candidate(model)
    number = model.num_made + 1
    candidate = VersionState(
        id=f"{version_stem(model.name)}-v{number}",
        source=source,
        path=path,
        role="candidate",
        goal=share,
        num_replicas=num_replicas,
    )
    return updated(model, versions=(*model.versions, candidate), num_made=number)


def version_stem(name: str) -> str:
    """A model's name as far as the names of Ray's actors and of files allow."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def _require_no_candidate(model: ModelState) -> None:
    if model.candidate:
        state = f"has {model.candidate.share:.0%} of the requests" if model.candidate.share else "is being started"
        raise Refused(f"{model.candidate.id} {state}: promote it or roll it back first")


def settle(model: ModelState, ready: Mapping[str, int]) -> ModelState:
    """A candidate whose replicas are all ready gets its share; with all of it, it is live and the old one retired.

    Args:
        ready: version -> replicas that answer.
    """
    candidate, live = model.candidate, model.live
    if candidate is None or ready.get(candidate.id, 0) < candidate.num_replicas:
        return model
    if candidate.goal < 1 and live:
        return _with(model, candidate, share=candidate.goal)
    model = _with(model, candidate, role="live", share=0.0)
    if live:
        model = updated(_with(model, live, role="retired"), previous=live.id)
    return _forget_old(model)


_REMEMBERED = 8  # versions without replicas whose names and folders are kept


def _forget_old(model: ModelState) -> ModelState:
    unused = [v.id for v in model.versions if v.role in ("retired", "failed") and v.id != model.previous]
    old = set(unused[:-_REMEMBERED])
    return updated(model, versions=tuple(v for v in model.versions if v.id not in old))


def is_settled(model: ModelState) -> bool:
    """Whether a model is live, and its candidate, if any, a canary that has its share."""
    candidate = model.candidate
    return model.live is not None and (candidate is None or candidate.share == candidate.goal)


def fail(model: ModelState, version_id: str, message: str) -> ModelState:
    """A candidate cannot start: requests go where they went before."""
    version = model.version(version_id)
    if version is None or version.role != "candidate":
        return model
    return _with(model, version, role="failed", share=0.0, message=message)


def promote(model: ModelState) -> ModelState:
    """The canary is to get all requests, once it has as many replicas as the live version.

    Raises:
        Refused: there is none.
    """
    candidate = model.candidate
    if candidate is None or candidate.goal >= 1:
        raise Refused(f"{model.name} has no canary to promote")
    num_replicas = max(candidate.num_replicas, model.live.num_replicas if model.live else 1)
    return _with(model, candidate, goal=1.0, num_replicas=num_replicas)


def rollback(model: ModelState) -> ModelState:
    """Without the candidate where there is one; else back to the version that was live before, which starts again.

    Raises:
        Refused: there is neither.
    """
    live, candidate = model.live, model.candidate
    if candidate and live:
        return _with(model, candidate, role="retired", share=0.0, message="rolled back")
    previous = model.version(model.previous) if model.previous else None
    if previous is None or live is None:
        raise Refused(f"{model.name} has no version to go back to")
    return _with(model, previous, role="candidate", share=0.0, goal=1.0, num_replicas=live.num_replicas, message="")


def resize(model: ModelState, version_id: str, num_replicas: int) -> ModelState:
    """Another number of replicas of a version."""
    version = model.version(version_id)
    return _with(model, version, num_replicas=num_replicas) if version else model


def canary_replicas(num_replicas: int, share: float) -> int:
    """Replicas that a canary's share of the requests needs, where the live version has `num_replicas`."""
    return max(1, round(num_replicas * share))


def wanted(models: Sequence[ModelState]) -> dict[str, int]:
    """Version -> replicas, of every version that is to run."""
    return {v.id: v.num_replicas for m in models for v in m.versions if v.role in ("live", "candidate")}


def route(model: ModelState, ready: Mapping[str, Sequence[Replica]]) -> Route:
    """Where the requests of a model and its adapters go. Before there is a live version: to the first that is ready.

    A version whose replicas are all lost keeps its share: the front has the model's other versions answer for it.

    Args:
        ready: version -> replicas that answer, with every adapter of the model.
    """
    candidate, live = model.candidate, model.live
    if live is None:
        shares = [(candidate or model.versions[-1], 1.0)]
    elif candidate is None or not candidate.share:
        shares = [(live, 1.0)]
    else:
        shares = [(live, 1.0 - candidate.share), (candidate, candidate.share)]
    versions = tuple(Version(version.id, tuple(ready.get(version.id, ())), share) for version, share in shares)
    return Route((model.name, *model.adapters), versions)


def changes(before: ModelState, after: ModelState) -> list[str]:
    """What has happened to a model, in words."""
    said = []
    for version in after.versions:
        old = before.version(version.id)
        if old is None or old == version:
            continue
        if version.role != old.role and version.role == "live":
            said.append(f"{version.id} answers all requests of {after.name}")
        elif version.role != old.role and version.role == "failed":
            rest = f"; {after.live.id} goes on" if after.live else ""
            said.append(f"{version.id} failed{rest}: {version.message}")
        elif version.share != old.share and version.role == "candidate":
            said.append(f"{version.id} answers {version.share:.0%} of the requests of {after.name}")
        elif version.num_replicas != old.num_replicas:
            said.append(f"{version.id}: {old.num_replicas} -> {version.num_replicas} replicas")
    return said
