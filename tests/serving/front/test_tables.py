"""What HAProxy is told, from states of any kind, without HAProxy."""

from __future__ import annotations

import re
from itertools import pairwise
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_dist.serving.front.config import maps, render
from swift_dist.serving.front.options import FrontOptions
from swift_dist.serving.front.state import FrontState, Replica, Route, Version
from swift_dist.serving.front.tables import DRAWS, NO_MODEL, Names, Server, Tables, ranges, tables

CONTROL = ("127.0.0.1", 9)


def whole(weights: list[int]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


@st.composite
def states(draw: st.DrawFn) -> FrontState:
    """Up to three models, with names of any characters."""
    names = draw(st.lists(st.text(min_size=1).filter(encodable), min_size=1, max_size=6, unique=True))
    routes, replica = [], 0
    for number, name in enumerate(names[:3]):
        weights = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any))
        versions = []
        for index, share in enumerate(whole(weights)):
            count = draw(st.integers(0, 3))
            ids = [f"{name} {replica + i}" for i in range(count)]
            replica += count
            versions.append(
                Version(f"{name}-{index}", tuple(Replica(i, "10.0.0.1", 1 + n) for n, i in enumerate(ids)), share)
            )
        routes.append(Route((name, *(names[3:] if number == 0 else ())), tuple(versions), draw(st.booleans())))
    return FrontState(tuple(routes), CONTROL)


def encodable(text: str) -> bool:
    return not any(0xD800 <= ord(character) < 0xE000 for character in text)


@settings(max_examples=40, deadline=None)
@given(states())
def test_every_name_leads_to_its_versions_in_their_shares(state: FrontState) -> None:
    names = Names(64)
    made = tables(state, names)
    for route in state.routes:
        for name in route.names:
            first = int(made.models[name.encode().hex().upper()])
            assert divmod(first, DRAWS)[1] == 0 and (first // DRAWS) % 2 == route.embeds
            counted = dict.fromkeys((version.id for version in route.versions), 0)
            for drawn, slot in made.shares.items():
                low, high = map(int, drawn.split(":"))
                if first <= low < first + DRAWS:
                    owner = next(version for version in counted if names.used.get(version) == int(slot[1:]))
                    counted[owner] += high - low + 1
            assert sum(counted.values()) == DRAWS
            for version in route.versions:
                assert abs(counted[version.id] - version.share * DRAWS) <= 1
                assert counted[version.id] == 0 or version.share > 0
    assert (NO_MODEL in made.models) == (len(state.routes) == 1)


@settings(max_examples=40, deadline=None)
@given(states())
def test_a_slot_holds_its_version_and_spares_of_the_same_model(state: FrontState) -> None:
    names = Names(64)
    made = tables(state, names)
    for route in state.routes:
        drawn = [version for version in route.versions if version.share > 0]
        for version in drawn:
            servers = list(made.slots[names.slot(version.id)].values())
            assert [s.replica for s in servers if not s.spare] == list(version.replicas)
            others = [r for other in drawn if other is not version for r in other.replicas]
            assert [s.replica for s in servers if s.spare] == others


@settings(max_examples=40, deadline=None)
@given(states())
def test_nothing_in_a_state_can_change_what_a_file_means(state: FrontState) -> None:
    """Maps have two words a line, the configuration has no byte of a name."""
    names = Names(64)
    made = tables(state, names)
    for content in maps(made).values():
        assert all(re.fullmatch(r"[!-~]+ [!-~]+", line) for line in content.split("\n")[:-1])
    labels = {unquote(label.split("|")[1]) for label in made.labels.values()}
    assert labels == {r.id for route in state.routes for v in route.versions if v.share > 0 for r in v.replicas}
    plain = FrontState(
        tuple(
            Route((f"m{i}",), tuple(Version(f"{i}.{j}", v.replicas, v.share) for j, v in enumerate(route.versions)))
            for i, route in enumerate(state.routes)
        ),
        CONTROL,
    )
    options = FrontOptions()
    text = render(options, CONTROL, made, 8, "/x/stream.lua")
    assert text == render(options, CONTROL, tables(plain, Names(64)), 8, "/x/stream.lua")


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20).filter(any))
def test_ranges_cover_all_draws(weights: list[int]) -> None:
    found = ranges(whole(weights))
    assert found[0][0] == 0 and found[-1][1] == DRAWS
    assert all(a[1] == b[0] for a, b in pairwise(found))


def one(*versions: Version, name: str = "m") -> FrontState:
    return FrontState((Route((name,), versions),), CONTROL)


def test_a_version_that_is_gone_keeps_its_slot_until_it_is_free() -> None:
    names = Names(2)
    a, b, c = (Replica(name, "h", 1) for name in "abc")
    tables(one(Version("v1", (a,))), names)
    made = tables(one(Version("v2", (b,))), names)
    assert {s.replica: s.spare for s in made.slots["v0"].values()} == {b: True}
    with pytest.raises(ValueError, match="more than 2 versions"):
        tables(one(Version("v3", (c,))), names)
    names.forget("v0")
    assert set(tables(one(Version("v3", (c,))), names).shares.values()) == {"v0"}
    assert names.used == {"v2": 1, "v3": 0}


@pytest.mark.parametrize(
    "state, said",
    [
        (one(Version("v", (), 0.4)), "sum to 1"),
        (one(Version("v", (), 1.5), Version("w", (), -0.5)), "sum to 1"),
        (one(Version("v", (), 0.5), Version("v", (), 0.5)), "version given twice: v"),
        (one(Version("v", (Replica("a", "h", 1), Replica("a", "h", 2)))), "replica given twice: a"),
        (FrontState((Route(("m", "m"), (Version("v", ()),)),), CONTROL), "model given twice: m"),
        (FrontState((Route(("m",), ()),), CONTROL), "sum to 1"),
    ],
)
def test_a_state_without_a_meaning(state: FrontState, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tables(state, Names(8))


def test_addresses_of_both_kinds() -> None:
    servers = {"v0": {"r1": Server(Replica("a", "fd00::1", 80)), "r2": Server(Replica("b", "h", 81), spare=True)}}
    text = render(FrontOptions(host="::"), ("::1", 9), Tables({}, {}, {}, servers), 1, "/x")
    assert "server r1 [fd00::1]:80 check" in text and re.search(r"server r2 h:81 check .* backup\n", text)
    assert "bind [::]:8000\n" in text and "server control [::1]:9\n" in text
