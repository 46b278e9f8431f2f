"""How a group is divided into Ulysses and ring, and who holds which tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swift_dist.errors import JobError
from swift_dist.sequence_parallel.degrees import Degrees, choose, fits_heads
from swift_dist.sequence_parallel.row import Row, row_for_all
from swift_dist.sequence_parallel.ulysses import heads_of_ranks


@pytest.mark.parametrize(
    "size, heads, kv_heads, per_node, expected",
    [
        (8, 32, 8, 8, (8, 1)),
        (8, 32, 8, 4, (4, 2)),  # the ring goes across nodes
        (16, 32, 8, 8, (8, 2)),
        (4, 6, 2, 8, (2, 2)),  # 4 does not divide 6 heads
        (8, 8, 1, 8, (8, 1)),  # one key-value head on every rank
        (3, 8, 4, 3, (1, 3)),
        (6, 12, 4, 6, (2, 3)),  # 3 and 6 ranks share 12 heads, but not 4 key-value heads
        (1, 7, 7, 1, (1, 1)),
        (5, 7, 7, 5, (1, 5)),
    ],
)
def test_chosen(size, heads, kv_heads, per_node, expected):
    found = choose(size, [(heads, kv_heads)], per_node)
    assert (found.ulysses, found.ring) == expected and found.size == size


def test_named_degrees():
    assert choose(8, [(8, 8)], 8, ulysses=2) == Degrees(2, 4)
    for wrong in (3, 16):
        with pytest.raises(JobError, match="one of 1, 2, 4, 8"):
            choose(8, [(8, 8)], 8, ulysses=wrong)


@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 8))
def test_each_rank_gets_the_keys_of_its_queries(groups, kv_heads, ranks):
    heads = groups * kv_heads
    if not fits_heads(ranks, heads, kv_heads):
        return
    sent = heads_of_ranks(heads, kv_heads, ranks)
    per_rank, queries = len(sent) // ranks, heads // ranks
    for rank in range(ranks):
        mine = sent[rank * per_rank : (rank + 1) * per_rank]
        wanted = [query // groups for query in range(rank * queries, (rank + 1) * queries)]
        # as attention pairs them: query head i of a rank with its key-value head i // (queries / key-value heads)
        assert [mine[index // (queries // per_rank)] for index in range(queries)] == wanted


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(1, 4), st.integers(1, 4))
def test_every_token_has_one_rank(lengths, ulysses, ring):
    row = Row(tuple(lengths), Degrees(ulysses, ring))
    assert sorted(row.order.tolist()) == list(range(sum(lengths)))
    assert [len(row.of(rank)) for rank in range(row.degrees.size)] == list(row.sizes)
    for ring_rank in range(ring):
        pieces = row.pieces(ring_rank)
        assert max(pieces) - min(pieces) <= 1


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(1, 8), st.integers(1, 64))
def test_no_rank_is_left_without_a_token(lengths, ulysses, ring):
    degrees = Degrees(ulysses, ring)
    row = row_for_all(tuple(lengths), degrees)
    assert min(row.sizes) >= 1
    assert row.lengths == tuple(lengths) or min(Row(tuple(lengths), degrees).sizes) == 0
    assert sum(row.lengths) - sum(lengths) <= 3 * degrees.size
