"""Where the nodes of a job without Ray meet: a store that the first node's driver serves, named in the run folder.

The port is bound and kept, not looked for and released: where the first choice is taken by another job, the next one
of the band is tried. The other nodes tell the first what befell them there, so that nobody waits for them.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_dist.config import JobConfig
from swift_dist.errors import JobError, RunError
from swift_dist.launchers.torchrun import PORTS, endpoint, first_port
from swift_dist.runs.files import read_json, write_json
from swift_dist.runs.folder import RunFolder

if TYPE_CHECKING:
    from torch.distributed import TCPStore

NAME = "meeting.json"
_COUNT, _WORD = "words", "word"
_CONNECT_SECONDS = 30.0
_TELL_SECONDS = 5.0
_POLL_SECONDS = 0.2


class Meeting:
    """As one node's driver sees it.

    Attributes:
        endpoint: ``host:port``, or None where this is the only node.
        address: this node's, as the others reach it: that on its way to the first one, or the endpoint's.
        is_first: whether this is the first node, which serves.
    """

    def __init__(self, endpoint: str | None, store: TCPStore | None = None, address: str | None = None) -> None:
        self.endpoint = endpoint
        self.address = address or (endpoint.rpartition(":")[0] if endpoint else None)
        self.is_first = store is not None or endpoint is None
        self._store = store
        self._published: Path | None = None
        self._heard: list[dict[str, Any]] = []

    def publish(self, folder: RunFolder) -> None:
        """Tell the other nodes, through the run folder, which must be this driver's by now."""
        if self._store is not None:
            status = folder.status()
            assert status
            self._published = folder.path / NAME
            write_json(self._published, {"endpoint": self.endpoint, "driver": asdict(status.driver)})

    def close(self) -> None:
        """Take back what was published."""
        if self._published is not None:
            self._published.unlink(missing_ok=True)

    def heard(self) -> list[dict[str, Any]]:
        """What the other nodes told the first so far; a look at its own memory. Elsewhere nothing."""
        if self.is_first and self._store is not None:
            while self._store.check([word := f"{_WORD}{len(self._heard) + 1}"]):
                self._heard.append(json.loads(self._store.get(word)))
        return self._heard

    def tell(self, word: dict[str, Any]) -> None:
        """Tell the first node, if this is another one. Nothing where it has gone: then it knows how the run ended."""
        if self.is_first:
            return
        from torch.distributed import DistError, TCPStore

        assert self.endpoint
        host, _, port = self.endpoint.rpartition(":")
        with contextlib.suppress(DistError):
            if self._store is None:
                timeout = timedelta(seconds=_TELL_SECONDS)
                self._store = TCPStore(host, int(port), is_master=False, timeout=timeout)
            self._store.set(f"{_WORD}{self._store.add(_COUNT, 1)}", json.dumps(word))


@contextlib.contextmanager
def served(job: JobConfig, folder: RunFolder) -> Iterator[Meeting]:
    """On the first node: the store, for as long as the body runs. `publish` it once the run folder is this driver's.

    Raises:
        JobError: the port that was asked for is taken, or all of the band are.
    """
    if job.cluster.nnodes == 1:
        yield Meeting(None)
        return
    host, port = endpoint(job)
    start = first_port(folder.path)
    store, number = _bind([port] if port else [*PORTS[start:], *PORTS[:start]])
    meeting = Meeting(f"{host or socket.gethostname()}:{number}", store)
    try:
        yield meeting
    finally:
        meeting.close()


def found(job: JobConfig, folder: RunFolder) -> Meeting:
    """On another node: wait until the first node's driver has taken the folder for this attempt and serves.

    Raises:
        JobError: nobody does, within ``cluster.rendezvous_timeout``.
        RunError: it has, and the run has failed meanwhile.
    """
    patience = job.cluster.rendezvous_timeout
    deadline = time.monotonic() + patience
    before = folder.status()
    while time.monotonic() < deadline:
        status, place = folder.status(), read_json(folder.path / NAME)
        held = status is not None and status.state == "running" and not status.is_dead and asdict(status.driver)
        if held and place and place["driver"] == held:  # else it is that of an attempt that was killed
            endpoint = str(place["endpoint"])
            if address := _address_towards(endpoint):
                return Meeting(endpoint, address=address)
        if status is not None and status.state == "failed" and status != before:
            raise RunError(f"the run has failed on the first node: {status.message}")
        time.sleep(_POLL_SECONDS)
    last = f"; the last attempt in it has {before.state}: {before.message}" if before and before.message else ""
    raise JobError(
        "output",
        f"nobody has begun a run in {folder.path} within {patience:.0f} s (cluster.rendezvous_timeout), "
        f"as seen from this node{last}",
        "start node 0, and name a folder on a file system that all nodes share",
    )


def _address_towards(endpoint: str) -> str | None:
    """Of this node, on its way there; None: nobody answers (any more, perhaps)."""
    host, _, port = endpoint.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), _CONNECT_SECONDS) as way:
        return str(way.getsockname()[0])
    return None


def _bind(ports: Sequence[int]) -> tuple[TCPStore, int]:
    from torch.distributed import DistNetworkError, TCPStore

    for port in ports:
        with contextlib.suppress(DistNetworkError):  # in use
            return TCPStore("localhost", port, is_master=True, wait_for_workers=False), port
    asked = str(ports[0]) if len(ports) == 1 else f"{PORTS[0]}-{PORTS[-1]}"
    raise JobError(
        "launch.torchrun.endpoint",
        f"port {asked} is in use on this node",
        "name another one, or none: then a free one of the band is taken",
    )
