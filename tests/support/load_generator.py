"""A closed-loop load on an OpenAI server: N clients, each of which sends its next request when its last was answered.

    load = Load(url, [chat_body("tiny", "hello", max_tokens=16)], concurrency=64, requests=1000)
    report = load.run()                        # here, until all are answered
    assert not report.failures, report.describe()

    with load.in_background() as running:      # while something is killed, updated, scaled
        kill(...)
        running.wait_for(500)                  # answers so far
    report = running.report                    # of all of them: leaving the block waits for the end

Every request ends as one `Answer`, whatever happened to it: nothing is retried, nothing is left out. A stream counts as
good only if it ended with ``data: [DONE]`` and no event was an error. Reads raw server-sent events, since parsing them
with the `openai` client takes more of a CPU than an engine's own server does.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

DONE = b"data: [DONE]"


@dataclass
class Answer:
    """What became of one request. Times are seconds of `time.perf_counter()`.

    Attributes:
        index: which request, from 0.
        status: HTTP's; None if no answer began.
        error: why it failed; None if it did not.
        began, ended: when it was sent, when its last byte came.
        events: when each event of a stream came that carries a choice; the first is the first token.
        headers: of the answer, in lower case.
        body: what was answered: the JSON, or the events of a stream (kept if it failed, or `Load.keep` says so).
    """

    index: int
    status: int | None = None
    error: str | None = None
    began: float = 0.0
    ended: float = 0.0
    events: list[float] = field(default_factory=list)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def first_event_seconds(self) -> float:
        """Time to the first token of a stream."""
        return self.events[0] - self.began


@dataclass(frozen=True)
class Report:
    """All answers of a load, in the order in which they ended."""

    answers: tuple[Answer, ...]
    seconds: float

    @property
    def failures(self) -> list[Answer]:
        return [a for a in self.answers if a.error is not None]

    @property
    def good(self) -> list[Answer]:
        return [a for a in self.answers if a.error is None]

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring events of the same stream, of all good streams."""
        return [b - a for answer in self.good for a, b in zip(answer.events, answer.events[1:], strict=False)]

    def count(self, header: str) -> Counter[str]:
        """How many good answers carry each value of a header."""
        return Counter(a.headers.get(header.lower(), "") for a in self.good)

    def describe(self) -> str:
        kinds = Counter(f"{a.status} {a.error}" for a in self.failures)
        lines = [f"{len(self.answers)} answers in {self.seconds:.1f} s, {len(self.failures)} failed"]
        return "\n".join(lines + [f"  {count} x {kind}" for kind, count in kinds.most_common(20)])


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of 100 of them do not exceed; nan of none."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)] if values else math.nan


def chat_body(model: str, text: str, *, stream: bool = False, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], "stream": stream, **more}


def completion_body(model: str, prompt: str | list[int], *, stream: bool = False, **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "stream": stream, **more}


@dataclass
class Load:
    """What is sent. A body with ``"stream": true`` is read as a stream.

    Attributes:
        url: of the server, without the path (``http://127.0.0.1:8000``).
        bodies: taken in turn; or a function of the request's index.
        concurrency: clients.
        requests: in all; None: until `Running.stop`.
        path: of the endpoint; None: that of the body's kind.
        api_key: sent as a bearer token.
        keep: whether the bodies of good answers are kept.
        timeout: seconds after which a request counts as failed.
    """

    url: str
    bodies: Sequence[Mapping[str, Any]] | Callable[[int], Mapping[str, Any]]
    concurrency: int = 1
    requests: int | None = None
    path: str | None = None
    api_key: str | None = None
    keep: bool = False
    timeout: float = 120.0

    def run(self) -> Report:
        return Running(self)._serve()

    @contextmanager
    def in_background(self) -> Iterator[Running]:
        """Runs in a thread meanwhile; leaving the block waits for all `requests`; without a number it stops."""
        running = Running(self)
        thread = threading.Thread(target=running._serve, name="load")
        thread.start()
        try:
            yield running
        except BaseException:
            running.stop()
            raise
        finally:
            if self.requests is None:
                running.stop()
            thread.join()
        if running._broken is not None:
            raise running._broken


class Running:
    """A load under way. `report` is there when it has ended."""

    report: Report

    def __init__(self, load: Load) -> None:
        self._load = load
        self._answers: list[Answer] = []
        self._next = 0
        self._stopped = False
        self._broken: BaseException | None = None

    @property
    def answers(self) -> list[Answer]:
        """Those so far."""
        return list(self._answers)

    @property
    def failures(self) -> list[Answer]:
        return [a for a in self.answers if a.error is not None]

    def wait_for(self, answers: int, timeout: float = 120.0) -> None:
        """Until there are that many answers.

        Raises:
            TimeoutError: there are not.
        """
        deadline = time.monotonic() + timeout
        while len(self._answers) < answers:
            if time.monotonic() > deadline or self._broken is not None:
                raise TimeoutError(f"{len(self._answers)} of {answers} answers after {timeout:.0f} s") from self._broken
            time.sleep(0.01)

    def stop(self) -> None:
        """Sends no more; what was sent is still waited for."""
        self._stopped = True

    def _serve(self) -> Report:
        began = time.perf_counter()
        try:
            asyncio.run(self._all())
        except BaseException as error:
            self._broken = error
            raise
        finally:
            self.report = Report(tuple(self._answers), time.perf_counter() - began)
        return self.report

    async def _all(self) -> None:
        import aiohttp

        load = self._load
        # force_close would pay for a connection each time; a client keeps its own, as the openai client does
        connector = aiohttp.TCPConnector(limit=0, force_close=False)
        timeout = aiohttp.ClientTimeout(total=load.timeout)
        headers = {"Authorization": f"Bearer {load.api_key}"} if load.api_key else {}
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
            await asyncio.gather(*(self._client(session) for _ in range(load.concurrency)))

    async def _client(self, session: Any) -> None:
        load = self._load
        while not self._stopped and (load.requests is None or self._next < load.requests):
            index, self._next = self._next, self._next + 1
            body = load.bodies(index) if callable(load.bodies) else load.bodies[index % len(load.bodies)]
            answer = Answer(index)
            try:
                await self._request(session, body, answer)
            finally:
                answer.ended = time.perf_counter()
                self._answers.append(answer)

    async def _request(self, session: Any, body: Mapping[str, Any], answer: Answer) -> None:
        import aiohttp

        load = self._load
        kind = "chat/completions" if "messages" in body else "embeddings" if "input" in body else "completions"
        data = json.dumps(body).encode()
        answer.began = time.perf_counter()
        try:
            async with session.post(
                load.url.rstrip("/") + (load.path or f"/v1/{kind}"),
                data=data,
                headers={"Content-Type": "application/json"},
            ) as response:
                answer.status = response.status
                answer.headers = {name.lower(): value for name, value in response.headers.items()}
                if response.status == 200 and body.get("stream"):
                    await self._stream(response, answer)
                    return
                answer.body = await response.read()
                if response.status != 200:
                    answer.error = answer.body[:300].decode(errors="replace")
                elif not load.keep:
                    json.loads(answer.body)
                    answer.body = b""
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            answer.error = f"{type(error).__name__}: {error}"[:300]

    async def _stream(self, response: Any, answer: Answer) -> None:
        kept, rest, ended = [], b"", False
        try:
            async for chunk in response.content.iter_any():
                now = time.perf_counter()
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if line.startswith(DONE):
                        ended = True
                    elif line.startswith(b"data:"):
                        if b'"error"' in line and "error" in json.loads(line[5:]):
                            answer.error = line[5:305].decode(errors="replace").strip()
                        elif b'"choices":[{' in line or b'"choices": [{' in line:
                            answer.events.append(now)
                kept.append(chunk)
        finally:
            answer.body = b"".join(kept)
        if answer.error is None and not ended:
            answer.error = "the stream ended without [DONE]"
        elif answer.error is None and not self._load.keep:
            answer.body = b""
