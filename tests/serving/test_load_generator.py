"""The load generator of the other tests, against a server with known answers: no failure passes for an answer."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator

import pytest
from load_generator import Load, chat_body, completion_body, percentile


class Server:
    """Answers by what the prompt says; counts what it was asked and how many at a time."""

    def __init__(self) -> None:
        self.seen: list[dict] = []
        self.at_once = self.most_at_once = 0
        self.together, self.gate = 1, asyncio.Event()  # nobody is answered before so many have asked

    async def answer(self, request):
        from aiohttp import web

        body = await request.json()
        self.seen.append({**body, "path": request.path, "key": request.headers.get("Authorization")})
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        if self.at_once == self.together:
            self.gate.set()
        try:
            await self.gate.wait()
            await asyncio.sleep(0.02)
            words = body["messages"][0]["content"] if "messages" in body else body["prompt"]
            if not body["stream"]:
                return self._plain(words, request)
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Swift-Version": "v1"})
            await response.prepare(request)
            for word in words.split():
                if word == "cut":
                    request.transport.abort()
                    return response
                if word == "end":
                    return response
                event = {"error": {"message": "gone"}} if word == "error" else {"choices": [{"text": word}]}
                await response.write(f"data: {json.dumps(event)}\n\n".encode())
                await asyncio.sleep(0.01)
            await response.write(b"data: [DONE]\n\n")
            return response
        finally:
            self.at_once -= 1

    def _plain(self, words, request):
        from aiohttp import web

        if words == "cut":
            request.transport.abort()
        if words == "busy":
            return web.json_response({"error": {"message": "busy"}}, status=429)
        return web.Response(text="not json" if words == "odd" else json.dumps({"choices": []}))


@pytest.fixture
def server() -> Iterator[tuple[Server, str]]:
    from aiohttp import web

    ready, addresses, loop = threading.Event(), [], asyncio.new_event_loop()
    known = Server()

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/v1/{kind:.*}", known.answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        addresses.append(runner.addresses[0])
        ready.set()

    def run() -> None:
        loop.run_until_complete(serve())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(60)
    yield known, f"http://127.0.0.1:{addresses[0][1]}"
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def test_as_many_requests_at_a_time_as_said_and_every_one_answered(server):
    known, url = server
    known.together = 8
    bodies = [chat_body("m", "a b c", stream=True), completion_body("m", "x")]
    report = Load(url, bodies, concurrency=8, requests=50, api_key="secret").run()
    assert not report.failures and len(report.good) == len(known.seen) == 50
    assert known.most_at_once == 8
    assert {(s["path"], s["key"]) for s in known.seen} == {
        ("/v1/chat/completions", "Bearer secret"),
        ("/v1/completions", "Bearer secret"),
    }
    streams = [a for a in report.good if a.index % 2 == 0]
    assert {len(a.events) for a in streams} == {3} and report.count("X-Swift-Version")["v1"] == 25
    assert all(a.began + 0.02 <= a.events[0] <= a.events[1] <= a.events[2] <= a.ended for a in streams)
    # Timed as they come, not when a stream ends; on a loaded machine two may come at once.
    assert len(report.gaps) == 50 and max(report.gaps) > 0.005


@pytest.mark.parametrize(
    ("words", "stream", "error"),
    [
        ("busy", False, "busy"),
        ("cut", False, "ServerDisconnected"),
        ("odd", False, "JSONDecodeError"),
        ("a error", True, "gone"),
        ("a cut", True, "Payload"),
        ("a end", True, "without [DONE]"),
    ],
)
def test_what_goes_wrong_is_reported(server, words, stream, error):
    _, url = server
    (answer,) = Load(url, [completion_body("m", words, stream=stream)], requests=1).run().failures
    assert error in answer.error and (answer.status is None) == (words == "cut")
    assert b'"a"' in answer.body if stream else True


def test_a_server_that_is_not_there_or_does_not_answer_in_time(server):
    known, url = server
    known.together = 2  # one is never answered
    gone = Load("http://127.0.0.1:9", [completion_body("m", "x")], requests=3, concurrency=3).run()
    assert len(gone.failures) == 3 and "3 failed" in gone.describe() and "ClientConnectorError" in gone.describe()
    (late,) = Load(url, [completion_body("m", "x")], requests=1, timeout=0.3).run().failures
    assert "Timeout" in late.error


def test_in_the_background_until_it_is_stopped(server):
    known, url = server
    with Load(url, [completion_body("m", "x")], concurrency=4).in_background() as running:
        running.wait_for(20)
    assert not running.report.failures and len(known.seen) == len(running.report.good) >= 20


def test_percentiles():
    values = [float(v) for v in range(1, 101)]
    assert [percentile(values, p) for p in (50, 99, 100)] == [50, 99, 100]
    assert percentile([3.0], 1) == 3.0 and percentile([], 50) != percentile([], 50)
