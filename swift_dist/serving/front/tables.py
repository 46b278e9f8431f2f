"""A state of the front as HAProxy's tables: what each of its maps holds, and the servers of each of its backends.

A version has a slot, one of a fixed number of equal backends (v0, v1, ...), as long as requests of it may run. So
HAProxy's file never changes: maps and servers do, at run time, and no connection is cut or kept on an old routing.

    models.map    hexadecimal name of a model (``-``: none was named) -> first number of its route: a multiple of
                  `DRAWS`, an odd one where the model is for embeddings
    shares.map    range of numbers -> slot. A request draws one of its route's `DRAWS` numbers at random
    servers.map   server -> version and replica, percent-encoded, for the log and the header ``x-swift-version``
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count, pairwise
from urllib.parse import quote

from swift_dist.serving.front.state import FrontState, Replica, Route

DRAWS = 1_000_000
NO_MODEL = "-"


@dataclass(frozen=True)
class Server:
    """A replica within a slot. A spare belongs to another version of the same model: it answers where none else can."""

    replica: Replica
    spare: bool = False


@dataclass(frozen=True)
class Tables:
    """What HAProxy holds. `slots` maps backend -> server's name -> server."""

    models: dict[str, str]
    shares: dict[str, str]
    labels: dict[str, str]
    slots: dict[str, dict[str, Server]]


@dataclass
class Names:
    """The names that HAProxy knows versions, replicas and routes by. None is used twice, but slots, once they are free.

    Args:
        slots: how many backends there are.
    """

    slots: int
    used: dict[str, int] = field(default_factory=dict)  # version -> slot
    answers: dict[str, frozenset[str]] = field(default_factory=dict)  # version -> names of its model
    servers: dict[Replica, str] = field(default_factory=dict)
    numbers: count[int] = field(default_factory=lambda: count(1))
    routes: count[int] = field(default_factory=lambda: count(1))

    def slot(self, version: str) -> str:
        """The backend of a version.

        Raises:
            ValueError: all are taken.
        """
        if version not in self.used:
            free = set(range(self.slots)) - set(self.used.values())
            if not free:
                raise ValueError(f"more than {self.slots} versions have requests at the same time")
            self.used[version] = min(free)
        return f"v{self.used[version]}"

    def server(self, replica: Replica) -> str:
        if replica not in self.servers:
            self.servers[replica] = f"r{next(self.numbers)}"
        return self.servers[replica]

    def forget(self, slot: str) -> None:
        """Free a slot: nothing runs there any more."""
        for version in [version for version, number in self.used.items() if f"v{number}" == slot]:
            del self.used[version]
            self.answers.pop(version, None)


def check(state: FrontState) -> None:
    """Refuse a state that has no single meaning.

    Raises:
        ValueError: a name, a version or a replica that is there twice, or shares that do not sum to 1.
    """
    versions = [version for route in state.routes for version in route.versions]
    _once("model", [name for route in state.routes for name in route.names])
    _once("version", [version.id for version in versions])
    _once("replica", [replica.id for version in versions for replica in version.replicas])
    for route in state.routes:
        shares = [version.share for version in route.versions]
        if any(not 0 <= share <= 1 for share in shares) or not math.isclose(sum(shares), 1, abs_tol=1e-9):
            raise ValueError(f"shares of {route.names[:1]} are {shares}; they are 0 to 1 and sum to 1")


def _once(what: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{what} given twice: {', '.join(twice)}")


def tables(state: FrontState, names: Names) -> Tables:
    """The tables of a state. `names` is extended by what is new.

    A version that is gone keeps its slot, with the replicas of its model's other versions as spares: those of its
    requests that still wait are answered by them. So are requests of a version whose own replicas are all lost.
    """
    check(state)
    models: dict[str, str] = {}
    shares: dict[str, str] = {}
    labels: dict[str, str] = {}
    slots: dict[str, dict[str, Server]] = {}
    for route in state.routes:
        first = (2 * next(names.routes) + route.embeds) * DRAWS
        models |= {hexadecimal(name): str(first) for name in route.names}
        if len(state.routes) == 1:
            models[NO_MODEL] = str(first)
        drawn = [version for version in route.versions if version.share > 0]
        for version in drawn:
            names.slot(version.id)
            names.answers[version.id] = frozenset(route.names)
            labels |= {names.server(r): f"{quote(version.id)}|{quote(r.id)}" for r in version.replicas}
        for (low, high), version in zip(ranges([v.share for v in drawn]), drawn, strict=True):
            if low < high:
                shares[f"{first + low}:{first + high - 1}"] = names.slot(version.id)
    for version_id in names.used:
        servers = _servers(version_id, _route_of(names.answers[version_id], state.routes))
        slots[names.slot(version_id)] = {names.server(server.replica): server for server in servers}
    return Tables(models, shares, labels, slots)


def _route_of(answered: frozenset[str], routes: Iterable[Route]) -> Route | None:
    return next((route for route in routes if answered & set(route.names)), None)


def _servers(version_id: str, route: Route | None) -> Iterable[Server]:
    for version in route.versions if route else ():
        if version.share > 0:
            yield from (Server(replica, spare=version.id != version_id) for replica in version.replicas)


def ranges(shares: list[float]) -> list[tuple[int, int]]:
    """The numbers below `DRAWS`, from and below, that each share gets; exact to one of them."""
    bounds = [0, *(round(DRAWS * sum(shares[: i + 1])) for i in range(len(shares)))]
    return list(pairwise(bounds))


def hexadecimal(name: str) -> str:
    """A name as HAProxy's converter ``hex`` writes it: safe in maps and commands, whatever characters it has."""
    return name.encode().hex().upper()


def first_number(drawn: str) -> str:
    """The first number of the route that a range of `Tables.shares` belongs to."""
    return str(int(drawn.split(":")[0]) // DRAWS * DRAWS)
