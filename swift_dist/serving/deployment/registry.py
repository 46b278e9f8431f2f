"""The replicas that a controller has heard of: which answer, which were lost, how long it took to make that good."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from swift_dist.serving.deployment.apps import actor_lives
from swift_dist.serving.deployment.replica import Report
from swift_dist.serving.front.state import Replica

_STALE_SECONDS = 1.5  # without a report: is the actor still there?
_SILENT_SECONDS = 15.0  # without a report: no more requests, although it is
_MAX_EVENTS = 1000


@dataclass
class Seen:
    """A replica that reported.

    Attributes:
        is_ready: it has every adapter. is_routed: the front sends it requests. is_draining: no more from now on.
        adapters: that the engine has, name -> folder; None: it was not asked yet.
        locks: by adapter; one change of it at a time.
    """

    report: Report
    at: float
    is_ready: bool = False
    is_routed: bool = False
    is_draining: bool = False
    adapters: dict[str, str] | None = None
    locks: dict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))

    @property
    def url(self) -> str:
        """The engine's."""
        host = self.report.host
        return f"http://[{host}]:{self.report.port}" if ":" in host else f"http://{host}:{self.report.port}"


@dataclass(frozen=True)
class Event:
    """Something that a person may want to know. Numbers grow, also from one controller to the next."""

    number: int
    time: float
    text: str


@dataclass
class Losses:
    """Of a version: when replicas were lost that have not been replaced, and how long the others took."""

    open: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class Registry:
    """Replicas by their id.

    Args:
        on_event: called after something has been noted in `events`.
        on_change: called after replicas have come or gone.
    """

    def __init__(self, on_event: Callable[[], None], on_change: Callable[[], None]) -> None:
        self.seen: dict[str, Seen] = {}
        self.losses: dict[str, Losses] = {}
        self.events: list[Event] = []
        self._on_event, self._on_change = on_event, on_change

    def tell(self, text: str) -> None:
        """Note an event."""
        number = max(time.time_ns(), self.events[-1].number + 1 if self.events else 0)
        self.events = [*self.events[-_MAX_EVENTS:], Event(number, time.time(), text)]
        self._on_event()

    def events_after(self, number: int) -> list[Event]:
        return [event for event in self.events if event.number > number]

    def report(self, report: Report) -> None:
        """A replica is alive."""
        seen = self.seen.get(report.id)
        if seen is None:
            seen = self.seen[report.id] = Seen(report, time.monotonic())
            self._close_loss(report.version)
            self._on_change()
        seen.report, seen.at = report, time.monotonic()

    def _close_loss(self, version: str) -> None:
        losses = self.losses.setdefault(version, Losses())
        if losses.open:
            took = time.time() - losses.open.pop(0)
            losses.seconds.append(took)
            self.tell(f"{version}: a replica answers again, {took:.1f} s after one was lost")

    def lose(self, replica_id: str, reason: str) -> None:
        """A replica has ended without having been told to."""
        seen = self.seen.pop(replica_id, None)
        if seen is None:
            return
        if not seen.is_draining:
            version = seen.report.version
            self.losses.setdefault(version, Losses()).open.append(time.time())
            self.tell(f"{version}: a replica was lost: {reason}")
        self._on_change()

    def forget(self, replica_id: str) -> None:
        """A replica has stopped in order."""
        self.seen.pop(replica_id, None)

    async def look_for_lost(self) -> None:
        """Lose those whose process has ended without a word."""
        now = time.monotonic()
        for replica_id, seen in list(self.seen.items()):
            if now - seen.at < _STALE_SECONDS or await asyncio.to_thread(actor_lives, replica_id):
                continue
            if self.seen.get(replica_id) is seen:  # not said by itself meanwhile
                self.lose(replica_id, "its process ended")

    def ready(self) -> dict[str, list[Replica]]:
        """Version -> replicas that requests may go to."""
        now = time.monotonic()
        ready: dict[str, list[Replica]] = {}
        for seen in self.seen.values():
            report = seen.report
            if seen.is_ready and not seen.is_draining and now - seen.at < _SILENT_SECONDS:
                ready.setdefault(report.version, []).append(Replica(report.id, report.host, report.port))
        return ready

    def note_routed(self, replica_ids: Iterable[str]) -> None:
        """The front sends requests to these, and to no others."""
        routed = set(replica_ids)
        for replica_id, seen in self.seen.items():
            seen.is_routed = replica_id in routed

    def load(self, version: str) -> int:
        """Requests that run or wait at a version's replicas."""
        reports = [s.report for s in self.seen.values() if s.report.version == version and not s.is_draining]
        return sum(report.load.running + report.load.waiting for report in reports)
