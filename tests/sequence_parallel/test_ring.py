"""What blocks of attention a ring computes of a sliding window."""

from __future__ import annotations

import pytest
import torch

from swift_dist.kernels.zigzag import chunks_of
from swift_dist.sequence_parallel import ring
from swift_dist.sequence_parallel.ring import blocks_of


@pytest.mark.parametrize("least", [1, 3, 1024])
@pytest.mark.parametrize("window", [1, 2, 5, 13, 200])
def test_each_pair_that_a_window_shows_is_in_one_block(monkeypatch, window, least):
    monkeypatch.setattr(ring, "_LEAST", least)
    lengths, ranks = [53, 2, 31], 3
    held = [chunks_of(lengths, ranks, rank) for rank in range(ranks)]
    for queries in held:
        places = [(c.sequence, place) for c in queries for place in range(c.begin, c.end)]
        for keys in held:
            others = [(c.sequence, place) for c in keys for place in range(c.begin, c.end)]
            found = torch.zeros(len(places), len(others), dtype=torch.int64)
            for block in blocks_of(queries, keys, window, "cpu"):
                part = found[block.queries, block.keys]
                seen = torch.ones(part.shape, dtype=torch.bool) if block.mask.seen is None else block.mask.seen
                part += seen.tril() if block.mask.causal else seen
            right = [[s == t and 0 <= q - k < window for t, k in others] for s, q in places]
            assert torch.equal(found, torch.tensor(right, dtype=torch.int64))


def test_a_window_on_a_long_sequence_costs_what_it_shows():
    """The masks of 1M tokens on 8 ranks would take 4 GiB each, and 32 times as many pairs would be computed."""
    tokens, ranks, window = 2**20, 8, 1024
    held = [chunks_of([tokens], ranks, rank) for rank in range(ranks)]
    areas = [
        (block.queries.stop - block.queries.start) * (block.keys.stop - block.keys.start)
        for other in held
        for block in blocks_of(held[0], other, window, "meta")
    ]
    assert sum(areas) < 2.1 * window * tokens / ranks and max(areas) <= window * window
