"""A proxy in the environment is for servers that the user names, not for those that were started here."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from toy_engine import ENGINE, save_toy_model
from upstreams import Upstream

from swift_dist.errors import RunError
from swift_dist.serving.engines.process import EngineProcess
from swift_dist.serving.inference.client import open_client, served_models
from swift_dist.serving.inference.pool import EnginePool
from swift_dist.serving.inference.replicas import RemoteReplica
from swift_dist.serving.options import EngineOptions, ServedModel

HOST = "127.0.0.2"  # no name of the loopback for whoever looks at it, as a cluster's addresses are none
ASKED = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


class Ours(RemoteReplica):
    is_ours = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Upstream]:
    with socket.socket() as bound:  # and does not listen: nobody answers there, and nobody else gets the port
        bound.bind(("127.0.0.1", 0))
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{bound.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        with Upstream("a", HOST) as upstream:
            yield upstream


def test_a_proxy_is_for_servers_that_the_user_names(server: Upstream) -> None:
    url = f"http://{HOST}:{server.port}"
    with open_client(url, is_ours=True) as client:
        assert client.chat.completions.create(**ASKED).choices[0].message.content == "a"
    with open_client(url, is_ours=False) as client, pytest.raises(openai.APIConnectionError):
        client.chat.completions.create(**ASKED)
    with pytest.raises(RunError, match="does not answer"):
        served_models(url)


def test_a_pool_asks_its_own_engines_directly(server: Upstream) -> None:
    async def ask() -> str:
        async with EnginePool([Ours(f"http://{HOST}:{server.port}")], 1) as pool, asyncio.timeout(60):
            answer = await pool.ask(lambda client: client.chat.completions.create(**ASKED))
            return str(answer.choices[0].message.content)

    assert asyncio.run(ask()) == "a"


def test_an_engine_is_asked_directly(server: Upstream, tmp_path: Path) -> None:
    served = ServedModel("m", str(save_toy_model(tmp_path / "model", "hello")), EngineOptions())
    with EngineProcess(ENGINE, served, HOST, log=tmp_path / "log").start() as process:
        assert process.wait_ready().load().running == 0
