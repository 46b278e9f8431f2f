"""The process of an engine: it ends whole, whoever dies first; and what it says while it starts, runs and fails."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from process_tree import gone_within

from swift_dist.errors import RunError
from swift_dist.lifetime import descendants
from swift_dist.serving.engines.base import Engine, Load
from swift_dist.serving.engines.process import EngineProcess
from swift_dist.serving.options import EngineOptions, ServedModel

SERVER = '''
"""A server with a child in a session of its own that is deaf to SIGTERM, as an engine's workers may be."""
import json, signal, subprocess, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

mode, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
if mode == "fails":
    print("loading", flush=True)
    sys.exit("no such weights")
deaf = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"]
subprocess.Popen(deaf, start_new_session=True)
if mode == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

class Handler(BaseHTTPRequestHandler):
    def answer(self, status, text):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
    def do_GET(self):
        if self.path == "/health":
            self.answer(503 if mode == "slow" else 200, "")
        elif self.path == "/metrics":
            self.answer(200, '# TYPE x gauge\\nx:running{model="a"} 2.0\\nx:running{model="b"} 1\\nx:waiting 4.0\\n')
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = "lora_path" not in body or body["lora_path"] == "/good"
        self.answer(200 if known else 404, json.dumps({"error": {"message": f"no adapter at {body.get('lora_path')}"}}))
    def log_message(self, *_): pass

print("ready to serve", flush=True)
server = ThreadingHTTPServer((host, port), Handler)
server.serve_forever()
'''


class Fake(Engine):
    name = "fake"
    running_metric, waiting_metric = "x:running", "x:waiting"

    def __init__(self, folder: Path, mode: str = "") -> None:
        self.file, self.mode = folder / "server.py", mode
        self.file.write_text(SERVER)

    def why_not(self):
        return None

    def check(self, served):
        """Whatever is asked for."""

    def command(self, served, host, port):
        return [sys.executable, str(self.file), self.mode or "plain", host, str(port)]


def process(folder: Path, mode: str = "") -> EngineProcess:
    served = ServedModel("m", str(folder), EngineOptions())
    return EngineProcess(Fake(folder, mode), served, log=folder / "logs" / "engine.log")


@contextlib.contextmanager
def killed_at_the_end(pids: list[int]):
    """A test that fails leaves nothing behind either."""
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_server_is_started_asked_and_stopped(tmp_path):
    with process(tmp_path).start().wait_ready() as server:
        assert server.log.read_text() == "ready to serve\n"
        assert server.alive and server.healthy()
        assert server.load() == Load(running=3, waiting=4)
        server.load_adapter("a", "/good")
        server.unload_adapter("a")
        with pytest.raises(RunError, match="refused /v1/load_lora_adapter: no adapter at /bad"):
            server.load_adapter("a", "/bad")
        pids = [server.pid, *descendants(server.pid)]
        assert len(pids) == 3
    assert not server.alive and not server.healthy()
    assert gone_within(pids, 10)
    with pytest.raises(RunError, match="did not answer /metrics"):
        server.load()


def test_sigterm_that_is_not_heard_is_followed_by_sigkill(tmp_path):
    server = process(tmp_path, "deaf").start().wait_ready()
    pids = [server.pid, *descendants(server.pid)]
    began = time.monotonic()
    server.stop(grace=0.5)
    assert 0.5 <= time.monotonic() - began < 9, "longer than the usual grace"
    assert gone_within(pids, 10)
    assert server.exit_code == 128 + signal.SIGKILL
    server.stop()  # twice does no harm


def test_a_server_that_ends_while_it_starts_says_why(tmp_path):
    server = process(tmp_path, "fails").start()
    with pytest.raises(RunError) as caught:
        server.wait_ready()
    assert "ended while it started (1)" in str(caught.value)
    assert str(caught.value).splitlines()[-2:] == ["  loading", "  no such weights"]


def test_a_server_that_is_never_ready_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(Fake, "start_seconds", 1.5)
    server = process(tmp_path, "slow").start()
    time.sleep(0.5)
    pids = [server.pid, *descendants(server.pid)]
    with pytest.raises(RunError, match="not ready after 2 s"):
        server.wait_ready()
    assert gone_within(pids, 10)


@pytest.mark.parametrize("victim", ["server", "guard"])
def test_nothing_survives_a_killed_server(tmp_path, victim):
    server = process(tmp_path).start().wait_ready()
    guard = server.pid
    (engine, worker) = descendants(guard)
    with killed_at_the_end([guard, engine, worker]):
        os.kill(guard if victim == "guard" else engine, signal.SIGKILL)
        # what a killed guard cannot find is the engine's own to end (vLLM: _vllm_server.py)
        assert gone_within([guard, engine] if victim == "guard" else [guard, engine, worker], 10)
        assert not server.alive and server.exit_code == (-9 if victim == "guard" else 137)


def test_nothing_survives_a_killed_owner(tmp_path):
    code = f"""
        import sys, time
        from pathlib import Path
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]!r}
        from test_engine_process import process
        server = process(Path({str(tmp_path)!r})).start().wait_ready()
        print("ready", flush=True)
        time.sleep(600)
    """
    owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "ready\n"
    below = descendants(owner.pid)
    assert len(below) == 3
    with killed_at_the_end(below):
        owner.kill()
        owner.communicate()
        assert gone_within(below, 10)


def test_a_thread_that_started_it_may_end(tmp_path):
    """The kernel's parent-death signal would come with the end of the thread."""
    server = process(tmp_path)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    server.wait_ready()
    time.sleep(0.3)
    assert server.alive and server.healthy()
    server.stop()


def test_its_port_is_given_to_nobody_else_while_it_starts(tmp_path):
    server = process(tmp_path, "slow").start()
    try:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", server.port))  # before the server binds it, or after
        with process(tmp_path / "logs").start() as second:
            assert second.port != server.port
    finally:
        server.stop(grace=0)


def test_a_port_that_is_taken_is_an_error_at_once(tmp_path):
    taken = pytest.raises(RunError, match="cannot be listened on: Address already in use")
    with socket.create_server(("127.0.0.1", 0)) as listening, taken:
        process(tmp_path).start(listening.getsockname()[1])


def test_a_command_that_does_not_exist_is_said(tmp_path):
    server = process(tmp_path)
    server.engine.command = lambda *_: ["/nowhere/vllm"]
    with pytest.raises(RunError, match=r"ended while it started \(127\)(.|\n)*/nowhere/vllm: No such file"):
        server.start().wait_ready()
