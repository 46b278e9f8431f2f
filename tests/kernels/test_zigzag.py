"""Sharding of packed sequences over a ring: each token once, balanced, and back again."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swift_dist.kernels.zigzag import chunks_of, order, parts_of, pieces_of, positions, shard, unshard
from tests.kernels.compare import agree, random

LENGTHS = [[16], [1], [7, 1, 1, 30, 2], [1] * 11, [3, 0, 5], [64, 64]]


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 9))
def test_each_token_once(lengths, ring):
    whole = order(lengths, ring) if lengths else torch.empty(0, dtype=torch.int64)
    assert sorted(whole.tolist()) == list(range(sum(lengths)))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 8))
def test_ranks_hold_as_many_tokens(lengths, ring):
    """Two chunks a sequence, each off by less than one token, and what is left over goes round."""
    held = [len(positions(lengths, ring, rank)) for rank in range(ring)]
    assert max(held) - min(held) <= 2 * len(lengths)
    ones = [len(positions([1] * (2 * ring * 5), ring, rank)) for rank in range(ring)]
    assert set(ones) == {10}


@pytest.mark.parametrize("ring", [2, 3, 4, 8])
def test_ranks_have_as_much_to_do(ring):
    """A token's work is the number of keys that it sees."""
    length = 2 * ring * 50
    work = [int((positions([length], ring, rank) + 1).sum()) for rank in range(ring)]
    assert max(work) == min(work)
    plain = [sum(range(r * length // ring + 1, (r + 1) * length // ring + 1)) for r in range(ring)]
    assert max(plain) / min(plain) > 2.5  # what contiguous pieces would be


def test_order_within_a_rank():
    assert [(c.sequence, c.number, c.begin, c.end) for c in chunks_of([8, 4], 2, 0)] == [
        (0, 0, 0, 2),
        (0, 3, 6, 8),
        (1, 0, 0, 1),
        (1, 3, 3, 4),
    ]
    assert positions([8, 4], 2, 1).tolist() == [2, 3, 4, 5, 9, 10]


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=3), st.integers(1, 4))
def test_whole_samples_are_cut_as_one_sequence_each(samples, ring):
    """As megatron's own split of a sample, to the token; what is different is where attention ends."""
    places = [(i, token) for i, lengths in enumerate(samples) for token in range(sum(lengths))]
    starts = list(accumulate((length for lengths in samples for length in lengths), initial=0))
    for rank in range(ring):
        found = [
            places[starts[piece.sequence] + token]
            for piece in pieces_of(samples, ring, rank)
            for token in range(piece.begin, piece.end)
        ]
        assert found == [
            (i, token)
            for i, lengths in enumerate(samples)
            for _, begin, end in parts_of(sum(lengths), ring, rank)
            for token in range(begin, end)
        ]
    assert {len(parts_of(4 * ring, ring, rank)) for rank in range(ring)} == {2}
    assert {end - begin for rank in range(ring) for _, begin, end in parts_of(4 * ring, ring, rank)} == {2}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("ring", [1, 2, 3])
@pytest.mark.parametrize("trailing", [(), (5,), (2, 3)])
def test_there_and_back(lengths, ring, trailing, backend, device):
    row = random(sum(lengths), *trailing, dtype=torch.float64, device=device)

    def round_trip(tensor):
        parts = [shard(tensor, lengths, ring, rank, backend=backend) for rank in range(ring)]
        return (unshard(parts, lengths, backend=backend), *parts)

    def expected(tensor):
        return (tensor, *(tensor[positions(lengths, ring, rank).to(device)] for rank in range(ring)))

    agree(round_trip, expected, [row], limit=0.0)


def test_integers(backend, device):
    tokens = torch.arange(10, device=device)
    assert shard(tokens, [6, 4], 2, 1, backend=backend).tolist() == positions([6, 4], 2, 1).tolist()
