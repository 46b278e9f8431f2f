"""The order of items: every sample once an epoch, a function of the seed and the data alone."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_dist.data.samples.order import GroupedItems, Items, PackedItems, PlainItems, SampleOrder, Shares

CAPACITY, BLOCK = 64, 4


def lengths_of(sizes: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, CAPACITY + 1, size) for size in sizes]


def make(how: str, sizes: list[int], seed: int = 1, shares: Shares | None = None, window: int = 1 << 20) -> Items:
    order, lengths = SampleOrder(sizes, seed, shares or Shares()), lengths_of(sizes)
    if how == "packed":
        return PackedItems(order, seed, lengths, CAPACITY, window)
    return GroupedItems(order, seed, lengths, BLOCK) if how == "grouped" else PlainItems(order)


def epoch(items: Items, number: int) -> list:
    start, end = (items.items_in(number + k) for k in (0, 1))
    return items.items(start, end - start)


HOW = st.sampled_from(["plain", "grouped", "packed"])


@settings(max_examples=30, deadline=None)
@given(HOW, st.lists(st.integers(1, 60), min_size=1, max_size=3), st.integers(0, 5), st.sampled_from([17, 1 << 20]))
def test_every_sample_once_in_every_epoch(how, sizes, seed, window):
    items = make(how, sizes, seed, window=window)
    for number in range(2):
        seen = Counter(chain.from_iterable(epoch(items, number)))
        assert seen == {(source, index): 1 for source, size in enumerate(sizes) for index in range(size)}


@settings(max_examples=30, deadline=None)
@given(HOW, st.lists(st.integers(1, 60), min_size=1, max_size=3), st.integers(0, 200), st.integers(0, 30))
def test_any_part_of_the_list_is_the_same_list(how, sizes, start, count):
    whole = make(how, sizes, window=16).items(0, start + count)
    assert make(how, sizes, window=16).items(start, count) == whole[start:]


@pytest.mark.parametrize("how", ["plain", "grouped", "packed"])
def test_epochs_and_seeds_have_orders_of_their_own(how):
    items = make(how, [50])
    first, second, other = epoch(items, 0), epoch(items, 1), epoch(make(how, [50], seed=2), 0)
    assert first != second and first != other
    assert first == epoch(make(how, [50]), 0)


@pytest.mark.parametrize("how", ["plain", "grouped", "packed"])
@pytest.mark.parametrize("epochs", [(2.0,), (3.0, 3.0), (2.0, 1.0), (0.5, 2.25)])
def test_each_source_as_often_as_its_epochs_say(how, epochs):
    sizes = [40, 24][: len(epochs)]
    items = make(how, sizes, shares=Shares(epochs=epochs))
    for number in range(2):
        seen = Counter(chain.from_iterable(epoch(items, number)))
        for source, (size, often) in enumerate(zip(sizes, epochs, strict=True)):
            counts = [seen[source, index] for index in range(size)]
            assert sum(counts) == round(size * often)
            assert max(counts) - min(counts) <= (1 if number == 0 else 2)


def test_equal_whole_epochs_follow_each_other():
    """Three epochs asked of every source: nothing is seen twice before all has been seen once."""
    items = make("packed", [30, 11], shares=Shares(epochs=(3.0, 3.0)))
    seen = list(chain.from_iterable(items.items(0, items.items_in(1))))
    for number in range(3):
        assert len(set(seen[number * 41 : (number + 1) * 41])) == 41


@pytest.mark.parametrize("how", ["plain", "grouped", "packed"])
def test_weights_are_shares(how):
    items = make(how, [10, 1000], shares=Shares(weights=(3.0, 1.0)))
    sources = Counter(source for source, _ in chain.from_iterable(items.items(0, items.items_in(1))))
    assert sum(sources.values()) == 1010 and abs(sources[0] - 757.5) < 3


@pytest.mark.parametrize("shares", [Shares(weights=(1.0, 2.0)), Shares(epochs=(0.5, 2.25)), Shares(epochs=(2.0, 1.0))])
@pytest.mark.parametrize("window", [50, 1 << 20])
def test_packs_hold_the_samples_of_their_pass(shares, window):
    """Passes whose samples, and so whose number of packs, differ."""
    sizes = [10, 90]
    items, order = make("packed", sizes, shares=shares, window=window), SampleOrder(sizes, 1, shares)
    for number in range(4):
        source, index = order.locate(number * order.period, order.period)
        wanted = Counter(zip(source.tolist(), index.tolist(), strict=True))
        assert Counter(chain.from_iterable(epoch(items, number))) == wanted


def test_packs_are_full_and_shuffled():
    items, lengths = make("packed", [3000]), lengths_of([3000])[0]
    used = np.array([sum(int(lengths[index]) for _, index in pack) for pack in epoch(items, 0)])
    assert used.max() <= CAPACITY and used.mean() / CAPACITY > 0.98
    largest = np.array([max(int(lengths[index]) for _, index in pack) for pack in epoch(items, 0)])
    assert abs(np.corrcoef(np.arange(len(largest)), largest)[0, 1]) < 0.1  # packing goes from long to short


def test_part_of_an_epoch_is_part_of_its_items():
    packed, whole = make("packed", [3000]), make("packed", [3000]).items_in(1)
    assert packed.items_in(0.5) == -(-whole // 2)
    assert packed.items_in(2.5) == 2 * whole + -(-whole // 2)
    assert make("plain", [10]).items_in(0.1) == 1 and make("plain", [30]).items_in(0.1) == 3


def test_grouped_neighbours_have_similar_lengths_at_random_places():
    size = 50 * BLOCK * 4
    lengths = lengths_of([size])[0]
    order = [int(lengths[index]) for ((_, index),) in epoch(make("grouped", [size]), 0)]
    blocks = np.array(order).reshape(-1, BLOCK)
    assert np.ptp(blocks, axis=1).max() <= 6  # of lengths from 1 to 64
    assert abs(np.corrcoef(np.arange(len(blocks)), blocks.mean(1))[0, 1]) < 0.3
