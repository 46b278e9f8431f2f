"""A small OpenAI server in a process of its own, which does what the bodies of requests ask: for tests of the front.

Fields of a body: `delay` (seconds before the answer, or before each event of a stream), `events` (of a stream),
`status` (answered instead), `say` (the text of an event), `die_at` (the process ends before that event; 0: before any
answer), `held_at` (that event, or the answer, waits for `Upstream.release`; 0: the stream's head, too). The answer's
text names the server. ``GET /seen`` says how many requests began, how many run, and how many their clients have left.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from types import TracebackType
from typing import Any


class Upstream:
    """The process. A context manager; `prefix` goes before its command line (such as ``nsenter``)."""

    def __init__(self, name: str, host: str = "127.0.0.1", prefix: Sequence[str] = (), port: int = 0) -> None:
        self.name, self.host = name, host
        self.process = subprocess.Popen(
            [*prefix, sys.executable, __file__, name, host, str(port)], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout
        self.port = int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop_answering(self) -> None:
        """The process is there and does nothing (SIGSTOP)."""
        self.process.send_signal(signal.SIGSTOP)

    def seen(self, forget: bool = False) -> dict[str, Any]:
        """What it has seen; `forget`: until now."""
        return self._ask("forget" if forget else "seen")

    def release(self) -> None:
        """Let what is held go on, and what is still to come."""
        self._ask("release")

    def _ask(self, what: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://{self.host}:{self.port}/{what}", timeout=60) as answer:
            return json.load(answer)

    def __enter__(self) -> Upstream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        assert self.process.stdout
        self.process.stdout.close()


def main(name: str, host: str, port: int) -> None:
    from aiohttp import web

    seen: dict[str, Any] = {"began": 0, "running": 0, "left": 0, "others": 0, "headers": {}}
    released = asyncio.Event()

    async def generate(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        seen["began"] += 1
        seen["running"] += 1
        seen["headers"] = dict(request.headers)
        try:
            return await (stream if body.get("stream") else answer)(request, body)
        except (asyncio.CancelledError, ConnectionResetError):
            seen["left"] += 1
            raise
        finally:
            seen["running"] -= 1

    async def answer(request: web.Request, body: dict[str, Any]) -> web.Response:
        await asyncio.sleep(body.get("delay", 0))
        if "held_at" in body:
            await released.wait()
        if body.get("die_at") == 0:
            os._exit(1)
        choices = [{"index": 0, "message": {"role": "assistant", "content": name}}]
        return web.json_response({"model": body.get("model"), "choices": choices}, status=body.get("status", 200))

    async def stream(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        if body.get("die_at") == 0:
            os._exit(1)
        await asyncio.sleep(body.get("first_delay", 0))
        if body.get("held_at") == 0:
            await released.wait()
        await response.prepare(request)
        for number in range(body.get("events", 5)):
            if body.get("held_at") == number:
                await released.wait()
            if body.get("die_at") == number:
                os._exit(1)
            text = body.get("say", "x")
            await response.write(b'data: {"choices": [{"index": 0, "delta": {"content": "%s"}}]}\n\n' % text.encode())
            await asyncio.sleep(body.get("delay", 0))
        await response.write(b"data: [DONE]\n\n")
        return response

    async def status(request: web.Request) -> web.Response:
        return web.json_response(seen)

    async def forget(request: web.Request) -> web.Response:
        seen.update(began=0, left=0, others=0)
        released.clear()
        return web.json_response(seen)

    async def release(request: web.Request) -> web.Response:
        released.set()
        return web.json_response(seen)

    async def models(request: web.Request) -> web.Response:
        seen["others"] += 1
        return web.json_response({"object": "list", "data": [], "server": name, "path": request.path})

    async def start() -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/seen", status)
        app.router.add_get("/forget", forget)
        app.router.add_get("/release", release)
        for path in ("/v1/chat/completions", "/v1/completions"):
            app.router.add_post(path, generate)
        app.router.add_route("*", "/{rest:.*}", models)
        # without this aiohttp lets a handler run on when its client has left
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, host, port).start()
        print(runner.addresses[0][1], flush=True)
        while os.getppid() != 1:
            await asyncio.sleep(0.5)

    asyncio.run(start())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
