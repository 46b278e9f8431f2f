"""Where the nodes of a job without Ray meet: a store that the first node's driver serves, named in the run folder.

The port is bound and kept, not looked for and released: where the first choice is taken by another job, the next one
of the band is tried. A node that cannot take part says so here, so that nobody waits for it.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from swift_dist.config import JobConfig
from swift_dist.errors import JobError
from swift_dist.launchers.torchrun import PORTS, endpoint, first_port
from swift_dist.runs.files import read_json, write_json
from swift_dist.runs.folder import RunFolder

if TYPE_CHECKING:
    from torch.distributed import TCPStore

NAME = "meeting.json"
_REFUSED = "refused"
_CONNECT_SECONDS = 30.0
_POLL_SECONDS = 0.2


class Meeting:
    """As one node's driver sees it.

    Attributes:
        endpoint: ``host:port``, or None where this is the only node.
    """

    def __init__(self, endpoint: str | None, store: TCPStore | None = None) -> None:
        self.endpoint = endpoint
        self._store = store
        self._published: Path | None = None

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

    def refusal(self) -> str | None:
        """Why a node does not take part. Only the first node is told; a look at its own memory."""
        if self._store is None or not self._store.check([_REFUSED]):
            return None
        return self._store.get(_REFUSED).decode()

    def refuse(self, reason: str) -> None:
        """Tell the first node that this one does not take part."""
        from torch.distributed import TCPStore

        assert self.endpoint
        host, _, port = self.endpoint.rpartition(":")
        store = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=_CONNECT_SECONDS))
        store.set(_REFUSED, f"{socket.gethostname()}: {reason}")


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
    """
    patience = job.cluster.rendezvous_timeout
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        status, place = folder.status(), read_json(folder.path / NAME)
        held = status is not None and status.state == "running" and not status.is_dead and asdict(status.driver)
        if held and place and place["driver"] == held:  # else it is that of an attempt that was killed
            return Meeting(str(place["endpoint"]))
        time.sleep(_POLL_SECONDS)
    raise JobError(
        "output",
        f"nobody has begun a run in {folder.path} within {patience:.0f} s (cluster.rendezvous_timeout), "
        "as seen from this node",
        "start node 0, and name a folder on a file system that all nodes share",
    )


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
