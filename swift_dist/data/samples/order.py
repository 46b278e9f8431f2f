"""The order in which samples are trained on: one endless list of items, a function of the seed and the data alone.

    samples  sources interleaved by share (`data/blend.py`); each source's own order is a new permutation every epoch
             (`data/order.py`)
    items    a sample each; or with packing a pack of samples each: the samples of an epoch (of a window of it, where it
             has more than 2^20) are packed together, and the packs shuffled; or with group_by_length samples sorted so
             that neighbours are of about the same length

Whatever the items are, those of an epoch hold each of its samples exactly once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Protocol

import numpy as np

from swift_dist.data.blend import Blend
from swift_dist.data.order import Permutation, derive
from swift_dist.data.samples.packing import pack

_WINDOW = 1 << 20  # samples packed at once: a second of work, and long enough that hardly any room is lost
_GROUPED_BATCHES = 50  # global batches sorted by length together, as in transformers' LengthGroupedSampler


@dataclass(frozen=True)
class Shares:
    """How much each source gives: by `weights`, or `epochs` times all of it in each pass; neither: by size."""

    weights: tuple[float, ...] = ()
    epochs: tuple[float, ...] = ()


class SampleOrder:
    """The samples of several sources, interleaved and shuffled, without end.

    Args:
        sizes: samples of each source, >= 1; shares: how much of the order each gives.

    Attributes:
        period: samples of one pass over the data, which train.epochs counts: all of every source, or `epochs` times all
            of each, or (by weight) as many as all sources hold.
        epochs_in_period: how often the source that is seen most often is seen in one pass (by weight: 1).
        repeats: whether every pass holds the same samples.
    """

    def __init__(self, sizes: Sequence[int], seed: int, shares: Shares = Shares()) -> None:
        self.sizes, self._seed = list(sizes), seed
        self.period, self.epochs_in_period, self.repeats = sum(sizes), 1, True
        if shares.weights:
            self._blend, self.repeats = Blend.from_weights(list(shares.weights), seed), len(sizes) == 1
        elif shares.epochs:
            counts = [round(size * epochs) for size, epochs in zip(sizes, shares.epochs, strict=True)]
            self.period, self.epochs_in_period = sum(counts), ceil(max(shares.epochs))
            equal = len(set(shares.epochs)) == 1
            self.repeats = all(epochs.is_integer() for epochs in map(float, shares.epochs))
            # Equal and whole: each epoch of all sources ends before the next one begins.
            self._blend = Blend(self.sizes if equal and self.repeats else counts, seed)
        else:
            self._blend = Blend(self.sizes, seed)
        self._permutation = lru_cache(maxsize=4 * len(self.sizes))(self._make_permutation)

    def samples_in(self, epochs: float) -> int:
        """Samples of `epochs` passes; of a broken sample's part the whole."""
        return ceil(round(epochs * self.period, 6))

    def _make_permutation(self, source: int, epoch: int) -> Permutation:
        return Permutation(self.sizes[source], self._seed, epoch)

    def locate(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Where samples start ... start + count - 1 of the order are.

        Returns:
            source: int64 [count]; index: int64 [count], of the sample in its source.
        """
        if len(self.sizes) == 1:
            source, ordinal = np.zeros(count, np.int64), np.arange(start, start + count, dtype=np.int64)
        else:
            source, ordinal = self._blend.locate(start, count)
        index = np.empty(count, dtype=np.int64)
        for k, size in enumerate(self.sizes):
            mine = np.flatnonzero(source == k)
            epochs = ordinal[mine] // size
            for epoch in np.unique(epochs).tolist():
                these = mine[epochs == epoch]
                index[these] = self._permutation(k, epoch)(ordinal[these] % size)
        return source, index


class Order(Protocol):
    """What items are made of: a `SampleOrder`, or a stream's (`stream_order.StreamOrder`)."""

    period: int
    epochs_in_period: int
    repeats: bool

    def samples_in(self, epochs: float) -> int: ...
    def locate(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]: ...


Lengths = Mapping[int, np.ndarray] | Sequence[np.ndarray]

Item = list[tuple[int, int]]
"""(source, index) of each sample of an item."""


class PlainItems:
    """Every sample is an item."""

    def __init__(self, order: Order) -> None:
        self._order = order

    def items(self, start: int, count: int) -> list[Item]:
        """Items start ... start + count - 1."""
        source, index = self._order.locate(start, count)
        return [[pair] for pair in zip(source.tolist(), index.tolist(), strict=True)]

    def items_in(self, epochs: float) -> int:
        """Items of the first `epochs` passes over the data."""
        return self._order.samples_in(epochs)


class GroupedItems(PlainItems):
    """Samples sorted by length within about 50 global batches, which are then shuffled: those of a micro-batch are of
    about the same length, whatever its size. What is sorted together ends where a pass ends.

    Args:
        lengths: int [samples] of each source; block: train.global_batch_size.
    """

    def __init__(self, order: Order, seed: int, lengths: Lengths, block: int) -> None:
        super().__init__(order)
        self._lengths, self._block = lengths, block
        self._seed = int.from_bytes(derive(seed, "length groups", size=8), "little")
        self._chunk = lru_cache(maxsize=2)(self._sorted)

    def items(self, start: int, count: int) -> list[Item]:
        out: list[Item] = []
        while count > 0:
            begin, end = self._bounds(start)
            source, index = self._chunk(begin, end)
            taken = min(end - start, count)
            here = slice(start - begin, start - begin + taken)
            out += [[pair] for pair in zip(source[here].tolist(), index[here].tolist(), strict=True)]
            start, count = start + taken, count - taken
        return out

    def _bounds(self, item: int) -> tuple[int, int]:
        """The items that are sorted together with `item`."""
        size, period = _GROUPED_BATCHES * self._block, -(-self._order.period // self._order.epochs_in_period)
        in_pass = item % self._order.period
        first = item - in_pass  # of the pass
        chunk, epoch = item // size, in_pass // period
        end = min((chunk + 1) * size, first + min((epoch + 1) * period, self._order.period))
        return max(chunk * size, first + epoch * period), end

    def _sorted(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        source, index = self._order.locate(begin, end - begin)
        by_length = np.argsort(-_lengths_of(self._lengths, source, index), kind="stable")
        # Blocks are the global batches: the first and the last may belong to this chunk in part only.
        inner = np.arange(-(-(begin + 1) // self._block) * self._block, end, self._block)
        edges = np.concatenate([[begin], inner, [end]]) - begin
        turns = Permutation(len(edges) - 1, self._seed, begin)(np.arange(len(edges) - 1))
        placed, given = np.empty(end - begin, np.int64), 0
        for block in turns.tolist():
            low, high = int(edges[block]), int(edges[block + 1])
            placed[low:high] = by_length[given : given + high - low]
            given += high - low
        return source[placed], index[placed]


class PackedItems:
    """Packs of samples, as full as they get.

    Args:
        lengths: int [samples] of each source; capacity: tokens of a pack.
    """

    def __init__(self, order: Order, seed: int, lengths: Lengths, capacity: int, window: int = _WINDOW) -> None:
        self._order, self._lengths, self._capacity = order, lengths, capacity
        self._seed = int.from_bytes(derive(seed, "pack order", size=8), "little")
        epochs = order.epochs_in_period
        self._windows = epochs * -(-order.period // (epochs * window))  # of a pass
        self._ends: list[int] = []  # items up to the end of each window seen so far
        self._pack = lru_cache(maxsize=2)(self._packed)

    def items(self, start: int, count: int) -> list[Item]:
        """Items start ... start + count - 1."""
        out: list[Item] = []
        number = bisect_right(self._ends, start)  # the first window that ends after `start`
        while count > 0:
            end = self._end_of(number)
            if start < end:
                source, index, ends = self._pack(number)
                first = start - (end - len(ends))
                taken = min(len(ends) - first, count)
                for item in range(first, first + taken):
                    these = slice(int(ends[item - 1]) if item else 0, int(ends[item]))
                    out.append(list(zip(source[these].tolist(), index[these].tolist(), strict=True)))
                start, count = start + taken, count - taken
            number += 1
        return out

    def items_in(self, epochs: float) -> int:
        """Items of the first `epochs` passes: of a window that they hold in part, that part of its packs."""
        samples, items, number = self._order.samples_in(epochs), 0, 0
        while True:
            begin, end = self._bounds(number)
            if samples <= begin and end > begin:
                return items
            packs = self._end_of(number) - items
            if samples < end:
                return items + -(-packs * (samples - begin) // (end - begin))
            items, number = items + packs, number + 1

    def _bounds(self, number: int) -> tuple[int, int]:
        """The samples of window `number` of the order."""
        turn, window = divmod(number, self._windows)
        period = self._order.period
        begin, end = (turn * period + (window + k) * period // self._windows for k in (0, 1))
        return begin, end

    def _end_of(self, number: int) -> int:
        while len(self._ends) <= number:
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + self._num_packs(len(self._ends)))
        return self._ends[number]

    def _num_packs(self, number: int) -> int:
        # A pass that is one window holds the same lengths as the first: only which samples have them is shuffled.
        if self._windows == 1 and self._order.repeats and number > 0:
            return self._ends[0]
        return len(self._pack(number)[2])

    def _packed(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """source and index int64 [samples] of a window, pack after pack; ends int64 [packs], where each one ends."""
        begin, end = self._bounds(number)
        if begin == end:  # fewer samples than epochs
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
        source, index = self._order.locate(begin, end - begin)
        members, ends = pack(_lengths_of(self._lengths, source, index), self._capacity)
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        turns = Permutation(len(ends), self._seed, number)(np.arange(len(ends)))
        sizes = (ends - starts)[turns]
        new_ends = np.cumsum(sizes)
        # Position p of pack k of the new order is position p of pack turns[k] of the old one.
        moved = np.arange(len(members)) + np.repeat(starts[turns] - (new_ends - sizes), sizes)
        return source[members[moved]], index[members[moved]], new_ends


Items = PlainItems | GroupedItems | PackedItems


def _lengths_of(lengths: Lengths, source: np.ndarray, index: np.ndarray) -> np.ndarray:
    out = np.empty(len(source), dtype=np.int64)
    for k in np.unique(source).tolist():  # of a stream's many chunks only those that these samples are of
        mine = source == k
        out[mine] = lengths[k][index[mine]]
    return out
