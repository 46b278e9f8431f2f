"""What a deployment is to be: models, their versions, and what each event makes of them. Pure values and functions.

A model has one version that is *live*. An update makes a *candidate* beside it, which gets its share of the requests
once all its replicas are ready: all of them (then it is live, and the former one retired but remembered), or a canary's
part, until it is promoted or rolled back. A candidate that cannot start has *failed*, and nothing else changes.

With a *surge* the candidate takes over a few replicas at a time, where there is no room for both versions at once.
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
        num_replicas: that are wanted in the end.
        now: that are wanted now, while one version takes over from another a few replicas at a time (else None).
        surge: of such a candidate, how many replicas both versions may have beyond `num_replicas`. With 0 an old
            replica ends before each new one starts.
        message: why it failed.
    """

    id: str
    source: str
    path: str
    role: Literal["live", "candidate", "retired", "failed"]
    share: float = 0.0
    goal: float = 1.0
    num_replicas: int = 1
    now: int | None = None
    surge: int | None = None
    message: str = ""

    @property
    def num_wanted(self) -> int:
        """Replicas that are to run now."""
        return self.num_replicas if self.now is None else self.now


class ModelState(Section):
    """A model: its versions, oldest first, and its adapters (name -> PEFT folder), which every version has.

    Attributes:
        task: what every version is for.
        previous: the version that was live before; a rollback returns to it.
        num_made: versions there ever were.
    """

    name: str
    task: Literal["generate", "embed"] = "generate"
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

    def share_of(self, version: VersionState) -> float:
        """Of the model's requests, that a version gets now."""
        if version is self.live:
            return 1.0 - (self.candidate.share if self.candidate else 0.0)
        return version.share


def _with(model: ModelState, version: VersionState, **changes: object) -> ModelState:
    """`model` with fields of one of its versions changed."""
    versions = tuple(updated(v, **changes) if v.id == version.id else v for v in model.versions)
    return updated(model, versions=versions)


def propose(
    model: ModelState, source: str, path: str, num_replicas: int, share: float = 1.0, surge: int | None = None
) -> ModelState:
    """A new version is to get `share` of the requests once `num_replicas` of it are ready.

    Args:
        surge: replicas beyond the present ones; see `VersionState` (None: as many as the new version has).

    Raises:
        Refused: another one is under way, or the surge does not fit.
    """
    _require_no_candidate(model)
    if surge is not None and share < 1:
        raise Refused("a canary runs beside all old replicas: a surge is of an update that gets all requests")
    number = model.num_made + 1
    candidate = VersionState(
        id=f"{version_stem(model.name)}-v{number}",
        source=source,
        path=path,
        role="candidate",
        goal=share,
        num_replicas=num_replicas,
    )
    return _begin(updated(model, versions=(*model.versions, candidate), num_made=number), surge)


def _begin(model: ModelState, surge: int | None) -> ModelState:
    """The candidate is to take over: all at once, or with a surge a few replicas at a time."""
    candidate, live = model.candidate, model.live
    if candidate is None or live is None or surge is None:
        return model
    most = max(candidate.num_replicas, live.num_replicas)
    if not surge and most == 1:
        raise Refused(f"{model.name} has one replica, and without it nothing would answer: a surge of 1 or more")
    ready = candidate.num_replicas if candidate.share else 0  # a canary's
    return _take_over(_with(model, candidate, now=ready, num_replicas=most, surge=surge))


def _take_over(model: ModelState) -> ModelState:
    """The next replicas of a candidate with a surge, all of whose replicas until now are ready.

    As many old ones end as there are new ones, and requests go to both by their numbers.
    """
    candidate, live = model.candidate, model.live
    assert candidate and live and candidate.surge is not None
    total, ready = candidate.num_replicas, candidate.num_wanted
    new = min(total, ready + max(candidate.surge, 1))
    old = min(live.num_wanted, total - (ready if candidate.surge else new))
    share = ready / (ready + old) if ready else 0.0
    return _with(_with(model, candidate, now=new, share=share), live, now=old)


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
    if candidate is None or ready.get(candidate.id, 0) < candidate.num_wanted:
        return model
    if candidate.goal < 1 and live:
        return _with(model, candidate, share=candidate.goal)
    if live and candidate.surge is not None and candidate.num_wanted < candidate.num_replicas:
        return _take_over(model)
    model = _with(model, candidate, role="live", share=0.0, now=None, surge=None)
    if live:
        model = updated(_with(model, live, role="retired", now=None), previous=live.id)
    return _forget_old(model)


_REMEMBERED = 8  # versions without replicas whose names and folders are kept


def _forget_old(model: ModelState) -> ModelState:
    unused = [v.id for v in model.versions if v.role in ("retired", "failed") and v.id != model.previous]
    old = set(unused[:-_REMEMBERED])
    return updated(model, versions=tuple(v for v in model.versions if v.id not in old))


def is_settled(model: ModelState) -> bool:
    """Whether a model is live, and its candidate, if any, a canary that has its share."""
    candidate = model.candidate
    is_canary = candidate is not None and candidate.surge is None and candidate.share == candidate.goal
    return model.live is not None and (candidate is None or is_canary)


def fail(model: ModelState, version_id: str, message: str) -> ModelState:
    """A candidate cannot start: requests go where they went before."""
    version = model.version(version_id)
    if version is None or version.role != "candidate":
        return model
    return _without(model, version, role="failed", message=message)


def _without(model: ModelState, candidate: VersionState, **changes: object) -> ModelState:
    """The live version has all its replicas, and all requests, again."""
    model = _with(model, candidate, share=0.0, now=None, surge=None, **changes)
    return _with(model, model.live, now=None) if model.live else model


def promote(model: ModelState, surge: int | None = None) -> ModelState:
    """The canary is to get all requests, once it has as many replicas as the live version.

    Args:
        surge: as of `propose`.

    Raises:
        Refused: there is none.
    """
    candidate = model.candidate
    if candidate is None or candidate.goal >= 1:
        raise Refused(f"{model.name} has no canary to promote")
    num_replicas = max(candidate.num_replicas, model.live.num_replicas if model.live else 1)
    if surge is not None:
        return _begin(_with(model, candidate, goal=1.0), surge)
    return _with(model, candidate, goal=1.0, num_replicas=num_replicas)


def rollback(model: ModelState, surge: int | None = None) -> ModelState:
    """Without the candidate where there is one; else back to the version that was live before, which starts again.

    A candidate that has taken over some replicas gives them back as it got them.

    Args:
        surge: as of `propose`, where the version before starts again.

    Raises:
        Refused: there is neither.
    """
    live, candidate = model.live, model.candidate
    if candidate and live and candidate.surge is not None and candidate.share:
        model = _with(model, live, role="candidate", share=1 - candidate.share, goal=1.0, surge=candidate.surge)
        return _with(model, candidate, role="live", share=0.0, surge=None)
    if candidate and live:
        return _without(model, candidate, role="retired", message="rolled back")
    previous = model.version(model.previous) if model.previous else None
    if previous is None or live is None:
        raise Refused(f"{model.name} has no version to go back to")
    again = _with(model, previous, role="candidate", share=0.0, goal=1.0, num_replicas=live.num_replicas, message="")
    return _begin(again, surge)


def resize(model: ModelState, version_id: str, num_replicas: int) -> ModelState:
    """Another number of replicas of a version."""
    version = model.version(version_id)
    return _with(model, version, num_replicas=num_replicas) if version else model


def canary_replicas(num_replicas: int, share: float) -> int:
    """Replicas that a canary's share of the requests needs, where the live version has `num_replicas`."""
    return max(1, round(num_replicas * share))


def wanted(models: Sequence[ModelState]) -> dict[str, int]:
    """Version -> replicas, of every version that is to run."""
    running = [v for m in models for v in m.versions if v.role in ("live", "candidate")]
    return {v.id: v.num_wanted for v in running if v.num_wanted}


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
    return Route((model.name, *model.adapters), versions, model.task == "embed")


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
