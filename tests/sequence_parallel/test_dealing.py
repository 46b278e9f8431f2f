"""Which sequences stay whole on a rank: as many tokens and as much work for each, and as little cut as will do."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_dist.sequence_parallel.dealing import TOLERANCE, deal
from swift_dist.sequence_parallel.degrees import Degrees
from swift_dist.sequence_parallel.row import Row

DEGREES = [Degrees(2, 1), Degrees(1, 2), Degrees(1, 3), Degrees(2, 2), Degrees(4, 2), Degrees(1, 8)]


def work(row: Row) -> list[float]:
    """Pairs of a query and a key of each rank, counted one by one; Ulysses ranks have a part of each head's."""
    degrees = row.degrees
    found = []
    for rank in range(degrees.size):
        held = row.chunks[rank // degrees.ulysses]
        together = sum(place + 1 for chunk in held for place in range(chunk.begin, chunk.end))
        alone = sum(place + 1 for length in row.whole_lengths(rank) for place in range(length))
        found.append(together / degrees.ulysses + alone)
    return found


@pytest.mark.parametrize("degrees", DEGREES)
@pytest.mark.parametrize("seed", range(6))
def test_tokens_and_work_are_balanced(degrees, seed):
    rng = random.Random(seed)
    row = Row(tuple(int(rng.lognormvariate(4, 1)) + 1 for _ in range(rng.choice([20, 80]))), degrees)
    assert max(row.sizes) - min(row.sizes) <= 2
    assert max(work(row)) * degrees.size <= TOLERANCE * sum(work(row))


@pytest.mark.parametrize("degrees", DEGREES)
def test_equal_short_sequences_stay_whole(degrees):
    row = Row((48,) * 24, degrees)
    assert row.cut_lengths == () and set(row.sizes) == {48 * 24 // degrees.size}
    dealt = deal((7,) * 25, degrees)  # one that fits nowhere, at most one for each rank
    assert len({chunk.sequence for held in dealt.chunks for chunk in held}) <= degrees.size


@pytest.mark.parametrize("degrees", DEGREES)
def test_long_sequences_are_cut_evenly(degrees):
    row = Row((960,), degrees)
    assert row.whole_lengths(0) == () and row.cut_lengths == (960,)
    parts = [(chunk.begin, chunk.end) for held in row.chunks for chunk in held]
    if degrees.ring > 1:
        step = 960 // (2 * degrees.ring)
        assert sorted(parts) == [(begin, begin + step) for begin in range(0, 960, step)]
        assert parts[:2] == [(0, step), (960 - step, 960)]
    row = Row((960, *[10] * 48), degrees)
    assert 960 in row.cut_lengths and sum(row.cut_lengths) < 1100


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 4))
def test_parts_of_a_sequence_lie_side_by_side_in_their_order(lengths, ulysses, ring):
    """What the ring's blocks rely on."""
    for held in deal(lengths, Degrees(ulysses, ring)).chunks:
        places = [(chunk.sequence, chunk.begin) for chunk in held]
        assert places == sorted(places)
