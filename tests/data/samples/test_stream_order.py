"""The order of streamed samples: every row once a pass, the same whatever is asked for, no more waiting than said."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from swift_dist.data.samples.order import GroupedItems, PackedItems, PlainItems
from swift_dist.data.samples.stream_order import WINDOW, ChunkStream, StreamOrder, encoding_order
from swift_dist.errors import RunError

SIZES = np.random.default_rng(0).integers(0, 9, 50).tolist()
TOTAL = sum(SIZES)


def stream(chunks: range = range(50), seed: int = 1, number: int = 0) -> ChunkStream:
    return ChunkStream(chunks, seed, number, SIZES.__getitem__)


def located(order: StreamOrder, start: int, count: int) -> list[tuple[int, int]]:
    chunk, index = order.locate(start, count)
    return list(zip(chunk.tolist(), index.tolist(), strict=True))


def test_every_sample_once_in_each_pass() -> None:
    order = StreamOrder([stream()], 1)
    everything = {(chunk, index) for chunk, size in enumerate(SIZES) for index in range(size)}
    passes = [located(order, turn * TOTAL, TOTAL) for turn in range(3)]
    assert all(set(one) == everything for one in passes)
    assert passes[0] != passes[1] != passes[2]
    assert passes[0] != located(StreamOrder([stream(seed=2)], 2), 0, TOTAL)


def test_the_order_does_not_depend_on_what_is_asked_for() -> None:
    whole = located(StreamOrder([stream()], 1), 0, 3 * TOTAL)
    for start, count in [(2 * TOTAL + 3, 20), (0, 1), (TOTAL - 2, 5)]:
        assert located(StreamOrder([stream()], 1), start, count) == whole[start : start + count]
    pieces, order = [], StreamOrder([stream()], 1)
    for start in range(0, 3 * TOTAL - 7, 7):
        pieces += located(order, start, 7)
    assert pieces == whole[: len(pieces)]


def test_a_sample_needs_only_the_chunks_of_its_window_and_those_before() -> None:
    asked: list[int] = []
    sizes = [size + 1 for size in SIZES]

    def size(chunk: int) -> int:
        asked.append(chunk)
        return sizes[chunk]

    chunks = ChunkStream(range(50), 1, 0, size)
    first_pass = chunks.order(0).tolist()
    assert sorted(first_pass) == list(range(50)) and first_pass != list(range(50))
    held = 0
    for window in (1, 2, 4, 8, 16, 16, 3):  # the last one holds what is left
        members = first_pass[held : held + window]
        start, size = sum(sizes[chunk] for chunk in first_pass[:held]), sum(sizes[chunk] for chunk in members)
        chunk, _ = chunks.locate(np.arange(start, start + size))
        assert set(chunk.tolist()) == set(members)
        held += window
        assert set(asked) == set(first_pass[:held])
    assert len({tuple(stream(seed=seed).order(0).tolist()) for seed in range(5)}) == 5


def test_samples_of_a_window_are_shuffled_over_its_chunks() -> None:
    chunks = ChunkStream(range(200), 3, 0, lambda chunk: 50)
    chunk, index = chunks.locate(np.arange(31 * 50, 47 * 50))  # the second window of 16 chunks
    assert len(set(chunk.tolist())) == WINDOW
    thirds = np.array_split(chunk, 3)
    assert all(len(set(third.tolist())) == WINDOW for third in thirds)
    assert abs(np.corrcoef(np.arange(len(index)), index)[0, 1]) < 0.1


def test_datasets_with_weights() -> None:
    streams = [stream(range(30), number=0), stream(range(30, 50), number=1)]
    order = StreamOrder(streams, 1, [3.0, 1.0])
    found = located(order, 0, 4000)
    second = sum(chunk >= 30 for chunk, _ in found)
    assert abs(second - 1000) <= 2
    seen = Counter(pair for pair in found if pair[0] >= 30)
    assert max(seen.values()) - min(seen.values()) <= 1  # its passes are whole
    assert len(seen) == sum(SIZES[30:])
    assert located(StreamOrder(streams, 1, [3.0, 1.0]), 777, 50) == found[777:827]
    needed = encoding_order(streams, [3.0, 1.0])
    assert sorted(needed) == list(range(50))
    assert sum(chunk >= 30 for chunk in needed[:20]) == 5


def test_the_first_chunks_are_encoded_in_the_order_of_need() -> None:
    assert encoding_order([stream()], ()) == stream().order(0).tolist()


def test_rows_without_a_sample_end_the_run() -> None:
    empty = ChunkStream(range(40), 1, 0, lambda chunk: 0)
    with pytest.raises(RunError, match="no sample"):
        empty.locate(np.zeros(1, np.int64))
    late = ChunkStream(range(40), 1, 0, lambda chunk: int(chunk == empty.order(0)[-1]))
    assert late.locate(np.zeros(1, np.int64))[0].tolist() == [int(empty.order(0)[-1])]


@pytest.mark.parametrize("kind", ["packed", "grouped", "plain"])
def test_items_of_a_stream_hold_every_sample_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swift_dist.data.samples.stream_order._SPAN", 32)
    lengths = {chunk: np.random.default_rng(chunk).integers(1, 17, size) for chunk, size in enumerate(SIZES)}

    def items(start: int, count: int) -> list:
        order = StreamOrder([stream()], 1)
        if kind == "packed":
            return PackedItems(order, 1, lengths, 16).items(start, count)
        if kind == "grouped":
            return GroupedItems(order, 1, lengths, 4).items(start, count)
        return PlainItems(order).items(start, count)

    found = items(0, 2 * TOTAL)
    assert items(37, 11) == found[37:48]
    flat = [pair for item in found for pair in item]
    spans = TOTAL // 32 * 32  # what is packed or sorted together may straddle the end of a pass
    counts = Counter(flat[:spans])
    assert max(counts.values()) == 1 and len(counts) == spans
    if kind == "packed":
        assert all(sum(lengths[chunk][index] for chunk, index in item) <= 16 for item in found)
        assert len(found[0]) > 1 or len(found[1]) > 1
    if kind == "grouped":
        blocks = [[int(lengths[c][i]) for ((c, i),) in found[k : k + 4]] for k in range(0, spans, 4)]
        spread = np.mean([max(block) - min(block) for block in blocks])
        assert spread < 3
