"""Best-fit decreasing packing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swift_dist.data.samples.packing import pack


def naive_best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """Tokens of each bin, one sequence after the other as the textbook has it."""
    bins: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [used for used in bins if used + length <= capacity]
        if fitting:
            bins[bins.index(max(fitting))] += length
        else:
            bins.append(length)
    return bins


@given(st.data())
def test_every_sequence_once_within_capacity_and_as_the_textbook_packs(data):
    capacity = data.draw(st.integers(1, 40))
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=120))
    members, ends = pack(np.array(lengths, np.int32), capacity)
    assert sorted(members.tolist()) == list(range(len(lengths)))
    bins = np.split(members, ends[:-1]) if len(ends) else []
    used = [sum(lengths[k] for k in these) for these in bins]
    assert all(0 < total <= capacity for total in used)
    assert sorted(used) == sorted(naive_best_fit_decreasing(lengths, capacity))


@pytest.mark.parametrize(("median", "sigma", "count"), [(300, 1.0, 20_000), (900, 1.2, 20_000), (900, 0.8, 5_000)])
def test_hardly_any_room_is_lost_on_long_tailed_lengths(median, sigma, count):
    capacity = 4096
    lengths = np.exp(np.random.default_rng(0).normal(np.log(median), sigma, count)).astype(np.int64).clip(1)
    lengths = lengths[lengths <= capacity]
    _, ends = pack(lengths, capacity)
    assert lengths.sum() / (len(ends) * capacity) >= 0.98


def test_the_order_of_equal_lengths_decides_which_go_together():
    lengths = np.array([3, 1, 3, 1, 2, 2])
    first, ends = pack(lengths, 4)
    assert [these.tolist() for these in np.split(first, ends[:-1])] == [[0, 1], [2, 3], [4, 5]]
    swapped, same = pack(lengths[[2, 3, 0, 1, 5, 4]], 4)
    assert np.array_equal(swapped, first) and np.array_equal(ends, same)
