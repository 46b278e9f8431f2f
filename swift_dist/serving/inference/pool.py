"""Several servers of one model, asked as if they were one: the least busy gets the next request, one that ends is
started again, and what it had is sent to another."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from swift_dist.errors import JobError, RunError
from swift_dist.serving.inference.client import as_run_error, open_async_client

if TYPE_CHECKING:
    from openai import AsyncOpenAI

T = TypeVar("T")
log = logging.getLogger(__name__)

MOST_LOSSES = 5
"""A request that so many servers ended on is given up: it may be what ends them."""
_MOST_REFUSALS = 3  # HTTP 5xx
_MOST_USELESS_STARTS = 3
_POLL_SECONDS = 0.5
_MOST_SECONDS_BETWEEN = 30.0
_MOST_SECONDS_OF_SILENCE = 60.0


class Replica(Protocol):
    """A server that can be started, more than once."""

    name: str
    is_ours: bool

    def start(self) -> str:
        """Start it and wait until it serves; returns its URL. Raises RunError."""
        ...

    def alive(self) -> bool:
        """Whether its process runs."""
        ...

    def answers(self) -> bool:
        """Whether it says that it serves."""
        ...

    def end(self) -> None:
        """End its process; it may be started again."""
        ...

    def stop(self) -> None:
        """End it for good: a `start` that another thread is in fails."""
        ...


class LostError(Exception):
    """A request was given up: every server that it was sent to ended or was not reached."""


@dataclass
class _Place:
    """A replica as the pool sees it."""

    replica: Replica
    client: AsyncOpenAI | None = None
    busy: int = 0
    answered: int = 0
    has_served: bool = False
    is_given_up: bool = False
    looked_at: asyncio.Event = field(default_factory=asyncio.Event)


class EnginePool:
    """An async context manager. All of it runs in one event loop.

    Args:
        replicas: started at once, each asked as soon as it is ready.
        most: requests to one of them at the same time.
    """

    def __init__(self, replicas: Sequence[Replica], most: int) -> None:
        self._places = [_Place(replica) for replica in replicas]
        self._most = most
        self._changed = asyncio.Condition()
        self._failure: RunError | JobError | None = None
        self._keepers: list[asyncio.Task[None]] = []
        self.restarts = 0

    async def __aenter__(self) -> EnginePool:
        self._keepers = [asyncio.create_task(self._keep(place)) for place in self._places]
        return self

    async def __aexit__(self, *_: object) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        # Before the keepers are waited for: one may be in a thread that waits for its server to be ready.
        await asyncio.gather(*(asyncio.to_thread(place.replica.stop) for place in self._places))
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for place in self._places:
            if place.client is not None:
                await place.client.close()

    async def _keep(self, place: _Place) -> None:
        """Start a replica, and again whenever it has ended."""
        useless = 0
        try:
            while True:
                began, before = time.monotonic(), place.answered
                url = await asyncio.to_thread(place.replica.start)
                place.has_served = True
                if place.replica.is_ours:
                    log.info("%s is ready after %.1f s", place.replica.name, time.monotonic() - began)
                await self._serve(place, url)
                useless = useless + 1 if place.answered == before else 0
                if useless >= _MOST_USELESS_STARTS:
                    raise RunError(f"{place.replica.name} ended {useless} times without an answer", "see its log")
                self.restarts += 1
                log.warning("%s ended: it is started again, and its requests are sent again", place.replica.name)
        except (RunError, JobError) as error:
            await self._fail(place, error)
        except Exception as error:  # such as a full disk: whoever waits for a replica must be told
            log.debug("%s cannot be had", place.replica.name, exc_info=True)
            await self._fail(
                place, RunError(f"{place.replica.name} cannot be started: {type(error).__name__}: {error}")
            )

    async def _serve(self, place: _Place, url: str) -> None:
        """Offer a replica until it is seen to have ended."""
        client = open_async_client(url, is_ours=place.replica.is_ours)
        silent_since: float | None = None
        try:
            while await asyncio.to_thread(place.replica.alive):
                place.looked_at.clear()
                if place.client is client or await asyncio.to_thread(place.replica.answers):
                    silent_since = None
                    await self._offer(place, client)
                else:
                    silent_since = silent_since or time.monotonic()
                    if time.monotonic() - silent_since > _MOST_SECONDS_OF_SILENCE:
                        log.warning("%s runs and does not answer: it is stopped", place.replica.name)
                        await asyncio.to_thread(place.replica.end)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(place.looked_at.wait(), _POLL_SECONDS)
        finally:
            place.client = None
            await client.close()

    async def _offer(self, place: _Place, client: AsyncOpenAI) -> None:
        if place.client is not client:
            place.client = client
            async with self._changed:
                self._changed.notify_all()

    async def _fail(self, place: _Place, error: RunError | JobError) -> None:
        """A replica cannot be had: all fails if it never was, or if no other is left."""
        place.is_given_up = True
        if place.has_served and not all(other.is_given_up for other in self._places):
            log.warning("%s cannot be started again, the others go on without it: %s", place.replica.name, error)
            return
        self._failure = self._failure or error
        async with self._changed:
            self._changed.notify_all()

    async def ask(self, send: Callable[[AsyncOpenAI], Awaitable[T]]) -> T:
        """Send a request to a replica, and to another one if that ends meanwhile.

        Args:
            send: makes the request with the client that it is given; called again for each attempt.

        Raises:
            openai.APIStatusError: the server refused the request. LostError: see there.
            RunError, JobError: no server can be had any more.
        """
        import openai

        losses = refusals = 0
        while True:
            place, client = await self._acquire()
            pause = 0.0
            try:
                answer = await send(client)
                place.answered += 1
                return answer
            except openai.APIConnectionError as error:
                losses += 1
                self._suspect(place, client)
                if losses >= MOST_LOSSES:
                    if not place.replica.is_ours:
                        raise as_run_error(error, place.replica.name) from None
                    raise LostError(f"{losses} servers ended or were not reached while they had it") from None
                pause = 0.0 if place.replica.is_ours else min(2.0**losses, _MOST_SECONDS_BETWEEN)
            except openai.RateLimitError as error:
                pause = _retry_after(error)
            except openai.InternalServerError:
                refusals += 1
                if refusals >= _MOST_REFUSALS:
                    raise
                pause = float(refusals)
            finally:
                await self._release(place)
            await asyncio.sleep(pause)

    def _suspect(self, place: _Place, client: AsyncOpenAI) -> None:
        """Nothing more is sent to a replica that did not answer until it is seen to live."""
        if place.client is client:
            place.client = None
        place.looked_at.set()

    async def _acquire(self) -> tuple[_Place, AsyncOpenAI]:
        async with self._changed:
            while True:
                if self._failure is not None:
                    raise self._failure
                free = [place for place in self._places if place.client is not None and place.busy < self._most]
                if free:
                    place = min(free, key=lambda place: place.busy)
                    assert place.client is not None
                    place.busy += 1
                    return place, place.client
                await self._changed.wait()

    async def _release(self, place: _Place) -> None:
        place.busy -= 1
        async with self._changed:
            self._changed.notify()


def _retry_after(error: Any) -> float:
    """Seconds that a server asks to be left alone."""
    try:
        return min(max(float(error.response.headers["retry-after"]), 0.1), _MOST_SECONDS_BETWEEN)
    except (KeyError, ValueError):
        return 1.0
