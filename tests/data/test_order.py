"""Permutation and blend: bijective, even, random access, and the same for ever."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from swift_dist.data.blend import Blend, _floor_sum
from swift_dist.data.order import Permutation


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 255, 256, 257, 1000, 65537])
def test_permutation_is_one(n: int) -> None:
    for seed in (0, 1, 2**63):
        for epoch in (0, 1):
            assert np.array_equal(np.sort(Permutation(n, seed, epoch)(np.arange(n))), np.arange(n))


def test_permutation_differs_by_seed_and_epoch_and_never_by_version() -> None:
    index = np.arange(10)
    assert Permutation(10**9, 1234, 0)(index).tolist() == PINNED
    assert Permutation(10**9, 1234, 1)(index).tolist() != PINNED
    assert Permutation(10**9, 1235, 0)(index).tolist() != PINNED


# A change here changes the data order of every run that anyone resumes.
PINNED = [221124947, 652907353, 780962767, 82145758, 308116824, 354280616, 291207316, 718985858, 823276567, 186343901]


def test_permutation_far_beyond_int32() -> None:
    n = 10**15
    out = Permutation(n, 7, 3)(np.arange(n - 4096, n))
    assert out.dtype == np.int64 and out.min() >= 0 and out.max() < n and len(set(out.tolist())) == 4096
    assert abs(out.mean() / n - 0.5) < 0.03


def test_permutation_looks_random() -> None:
    """All 24 orders of 4 items appear; each of 50 places is as likely (chi-square, 49 degrees: 99.99 % below 96)."""
    orders = Counter(tuple(Permutation(4, seed, 0)(np.arange(4))) for seed in range(4800))
    assert len(orders) == 24 and min(orders.values()) > 120
    places = Counter(int(Permutation(50, seed, 1)(np.array([1]))[0]) for seed in range(10000))
    assert sum((places[k] - 200) ** 2 / 200 for k in range(50)) < 96
    # neighbours do not stay neighbours
    out = Permutation(10000, 3, 0)(np.arange(10000))
    assert np.count_nonzero(np.abs(np.diff(out)) == 1) < 12


def test_floor_sum_against_the_sum() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        n, m, a, b = draw.randrange(60), draw.randrange(1, 60), draw.randrange(90), draw.randrange(90)
        assert _floor_sum(n, m, a, b) == sum((a * i + b) // m for i in range(n))


@pytest.mark.parametrize("shares", [[1], [3, 5], [1, 1, 1], [7, 1000, 13], [2, 3, 5, 7, 11, 1301], [999983, 17]])
def test_blend_is_even_at_every_prefix_and_exact_at_the_end(shares: list[int]) -> None:
    total = sum(shares)
    blend = Blend(shares, 11)
    length = min(total, 20000)
    source, ordinal = blend.locate(0, length)
    for k, share in enumerate(shares):
        count = np.cumsum(source == k)
        assert np.abs(count - np.arange(1, length + 1) * share / total).max() < 6
        assert np.array_equal(ordinal[source == k], np.arange(np.count_nonzero(source == k)))
    for many in (1, 2, 5):
        assert blend.counts(many * total) == [many * share for share in shares]
    draw = random.Random(1)
    for _ in range(20):
        start = draw.randrange(length)
        size = draw.randrange(length - start + 1)
        again, place = blend.locate(start, size)
        assert np.array_equal(again, source[start : start + size])
        assert np.array_equal(place, ordinal[start : start + size])


def test_weights_keep_their_shares_a_long_way_out() -> None:
    blend = Blend.from_weights([0.3, 0.6, 0.1], 5)
    assert blend.modulus == 1 << 62
    for samples in (1000, 10**9, 10**14):
        counts = blend.counts(samples)
        assert sum(counts) == samples
        for count, weight in zip(counts, (0.3, 0.6, 0.1), strict=True):
            assert abs(count - weight * samples) < 10
    source, ordinal = blend.locate(10**14, 2000)
    assert np.array_equal(ordinal[source == 2], blend.counts(10**14)[2] + np.arange(np.count_nonzero(source == 2)))
    assert Blend.from_weights([3, 6, 1], 5).bounds[1] == pytest.approx(blend.bounds[1], rel=1e-15)


def test_blend_depends_on_the_seed() -> None:
    first = Blend.from_weights([1, 1], 0).locate(0, 64)[0]
    assert not np.array_equal(first, Blend.from_weights([1, 1], 1).locate(0, 64)[0])
