"""The order of streamed samples: pure in (seed, samples of each chunk), and known as far as chunks are encoded.

    chunks   pieces of the sources (about a MiB of text); each pass takes all of them, in an order of its own
    windows  16 consecutive chunks of that order (of several streams fewer, as each keeps its own open), whose samples
             are shuffled together; in the first pass 1, 2, 4 and 8 come first, so that training begins with the first
    samples  those of one stream of all chunks; or where datasets have weights of a stream each, interleaved by share

So each pass holds each sample once, sample number n of the order is the same on any number of ranks, and it depends on
no chunk that comes after its window.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from swift_dist.data.blend import Blend
from swift_dist.data.order import Permutation, derive
from swift_dist.errors import RunError

WINDOW = 16
_SPAN = 1 << 12  # samples that are packed, or sorted by length, together: few, because all of them must be encoded


class ChunkStream:
    """The samples of some chunks, again and again.

    Args:
        chunks: their numbers; number: of the stream, which has an order of its own.
        num_samples: of a chunk; called for chunks in the order in which they are needed, and may wait for one.
        window: chunks whose samples are shuffled together.
    """

    def __init__(
        self,
        chunks: Sequence[int],
        seed: int,
        number: int,
        num_samples: Callable[[int], int],
        window: int = WINDOW,
    ) -> None:
        self._chunks, self._num_samples = np.asarray(chunks, dtype=np.int64), num_samples
        self._chunk_seed, self._sample_seed = (
            int.from_bytes(derive(seed, purpose, number, size=8), "little") for purpose in ("chunks", "in windows")
        )
        self._first_edges, self._edges = _edges(len(chunks), 1, window), _edges(len(chunks), window, window)
        self._ends: list[int] = []  # samples up to the end of each window that is known
        self._order = lru_cache(maxsize=2)(self.order)
        self._window = lru_cache(maxsize=4)(self._make_window)

    def order(self, turn: int) -> np.ndarray:
        """The chunks of pass `turn`, in order."""
        places = Permutation(len(self._chunks), self._chunk_seed, turn)(np.arange(len(self._chunks)))
        return self._chunks[places]

    def locate(self, ordinals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where samples of the stream are.

        Args:
            ordinals: int64 [n], ascending.

        Returns:
            chunk: int64 [n]; index: int64 [n], of the sample in its chunk.

        Raises:
            RunError: no chunk has a sample.
        """
        chunk, index = np.empty(len(ordinals), np.int64), np.empty(len(ordinals), np.int64)
        begin = 0
        while begin < len(ordinals):
            number = self._window_of(int(ordinals[begin]))
            end = int(np.searchsorted(ordinals, self._ends[number]))
            members, starts, shuffle = self._window(number)
            place = shuffle(ordinals[begin:end] - (self._ends[number - 1] if number else 0))
            member = np.searchsorted(starts, place, side="right") - 1
            chunk[begin:end], index[begin:end] = members[member], place - starts[member]
            begin = end
        return chunk, index

    def _window_of(self, ordinal: int) -> int:
        while not self._ends or self._ends[-1] <= ordinal:
            number = len(self._ends)
            samples = sum(self._num_samples(int(chunk)) for chunk in self._members(number))
            self._ends.append((self._ends[-1] if self._ends else 0) + samples)
            if not self._ends[-1] and number + 2 == len(self._first_edges):
                raise RunError("the rows give no sample", "correct them; data.cache lists those that cannot be used")
        return bisect_right(self._ends, ordinal)

    def _members(self, number: int) -> np.ndarray:
        """The chunks of window `number`."""
        edges, turn, first = self._first_edges, 0, len(self._first_edges) - 1
        if number >= first:
            edges = self._edges
            turn, number = divmod(number - first, len(edges) - 1)
            turn += 1
        return self._order(turn)[edges[number] : edges[number + 1]]

    def _make_window(self, number: int) -> tuple[np.ndarray, np.ndarray, Permutation]:
        """Its chunks that have samples, where each one's begin among the window's, and how those are shuffled."""
        sizes = [(int(chunk), self._num_samples(int(chunk))) for chunk in self._members(number)]
        sizes = [(chunk, size) for chunk, size in sizes if size]
        ends = np.cumsum([size for _, size in sizes])
        members, starts = np.array([chunk for chunk, _ in sizes], np.int64), np.concatenate([[0], ends[:-1]])
        return members, starts, Permutation(int(ends[-1]), self._sample_seed, number)


def _edges(num_chunks: int, first: int, most: int) -> list[int]:
    """Where windows begin, and the end: the first one has `first` chunks, each next one twice as many, up to `most`."""
    edges, size = [0], first
    while edges[-1] < num_chunks:
        edges.append(min(edges[-1] + size, num_chunks))
        size = min(2 * size, most)
    return edges


class StreamOrder:
    """What `order.SampleOrder` is, for samples of chunks: `locate` gives the number of a chunk as source.

    Args:
        streams: one, or one for each of `weights`.

    Attributes:
        period, epochs_in_period, repeats: no pass has an end that is known; spans of `period` samples stand for passes
            where items are made of several samples.
    """

    def __init__(self, streams: Sequence[ChunkStream], seed: int, weights: Sequence[float] = ()) -> None:
        self.period, self.epochs_in_period, self.repeats = _SPAN, 1, False
        self._streams = streams
        self._blend = Blend.from_weights(list(weights), seed) if len(streams) > 1 else None

    def locate(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Where samples start ... start + count - 1 of the order are: their chunks and places in these, int64 [count].

        May wait for chunks, as `ChunkStream.locate` does.
        """
        if self._blend is None:
            return self._streams[0].locate(np.arange(start, start + count, dtype=np.int64))
        number, ordinals = self._blend.locate(start, count)
        chunk, index = np.empty(count, np.int64), np.empty(count, np.int64)
        for k, stream in enumerate(self._streams):
            mine = np.flatnonzero(number == k)
            chunk[mine], index[mine] = stream.locate(ordinals[mine])
        return chunk, index

    def samples_in(self, epochs: float) -> int:
        """Not known: `streaming.require_streamable` refuses train.epochs."""
        raise AssertionError(f"{epochs} passes over a stream")


def encoding_order(streams: Sequence[ChunkStream], weights: Sequence[float]) -> list[int]:
    """All chunks, in about the order in which training needs them first."""
    orders = [stream.order(0) for stream in streams]
    shares = list(weights) or [1.0]
    needed = [(place / share, k, place) for k, share in enumerate(shares) for place in range(len(orders[k]))]
    return [int(orders[k][place]) for _, k, place in sorted(needed)]
