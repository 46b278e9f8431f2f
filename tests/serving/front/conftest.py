from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ports import free_port
from upstreams import Upstream

from swift_dist.serving.front.haproxy import Front
from swift_dist.serving.front.options import FrontOptions
from swift_dist.serving.front.state import FrontState


@pytest.fixture(scope="module")
def idle_upstreams() -> Iterator[list[Upstream]]:
    """Servers that no test uses at the moment."""
    idle: list[Upstream] = []
    yield idle
    for upstream in idle:
        upstream.__exit__(None, None, None)


@pytest.fixture
def make_upstream(idle_upstreams: list[Upstream]) -> Iterator[Callable[[str], Upstream]]:
    made: list[Upstream] = []

    def make(name: str) -> Upstream:
        made.append(idle_upstreams.pop() if idle_upstreams else Upstream("server"))
        made[-1].name = name
        return made[-1]

    yield make
    for upstream in made:
        if upstream.process.poll() is None and upstream.seen(forget=True)["running"] == 0:
            idle_upstreams.append(upstream)
        else:
            upstream.__exit__(None, None, None)


@pytest.fixture
def make_front(tmp_path: Path) -> Iterator[Callable[..., Front]]:
    made: list[Front] = []

    def make(state: FrontState, **options: object) -> Front:
        made.append(Front(tmp_path / f"front{len(made)}", FrontOptions(port=free_port(), **options)))  # type: ignore[arg-type]
        return made[-1].start(state)

    yield make
    for front in made:
        front.stop(drain=0)
