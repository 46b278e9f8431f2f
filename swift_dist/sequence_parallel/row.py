"""Which rank of a group holds which tokens of a micro-batch's row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch

from swift_dist.kernels.zigzag import Chunk, chunks_of, positions
from swift_dist.sequence_parallel.degrees import Degrees


@dataclass(frozen=True)
class Row:
    """A row of sequences dealt out: zigzag over the ring (`kernels/zigzag.py`), then a ring rank's tokens, in the order
    in which it holds them, in `ulysses` contiguous pieces as long as each other but for one token.

    Args:
        lengths: tokens of each sequence, in their order in the row.
        degrees: of the group.
    """

    lengths: tuple[int, ...]
    degrees: Degrees

    @cached_property
    def chunks(self) -> tuple[tuple[Chunk, ...], ...]:
        """Of each ring rank, in the order in which it holds them."""
        return tuple(tuple(chunks_of(self.lengths, self.degrees.ring, rank)) for rank in range(self.degrees.ring))

    @cached_property
    def ring_tokens(self) -> tuple[int, ...]:
        """Tokens of each ring rank."""
        return tuple(sum(chunk.end - chunk.begin for chunk in chunks) for chunks in self.chunks)

    def pieces(self, ring_rank: int) -> tuple[int, ...]:
        """Tokens of each Ulysses rank of a ring rank."""
        ends = [self.ring_tokens[ring_rank] * k // self.degrees.ulysses for k in range(self.degrees.ulysses + 1)]
        return tuple(end - begin for begin, end in pairwise(ends))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each rank of the group."""
        return tuple(piece for rank in range(self.degrees.ring) for piece in self.pieces(rank))

    def of(self, rank: int) -> torch.Tensor:
        """int64 [t]: where the tokens of a rank of the group stand in the row."""
        ring_rank, ulysses_rank = divmod(rank, self.degrees.ulysses)
        pieces = self.pieces(ring_rank)
        start = sum(pieces[:ulysses_rank])
        return positions(self.lengths, self.degrees.ring, ring_rank)[start : start + pieces[ulysses_rank]]

    @cached_property
    def order(self) -> torch.Tensor:
        """int64 [T]: the tokens of rank 0, then those of rank 1, ..."""
        return torch.cat([self.of(rank) for rank in range(self.degrees.size)])

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each sequence begins in the row, and the end of the last."""
        return tuple(accumulate(self.lengths, initial=0))


def row_for_all(lengths: tuple[int, ...], degrees: Degrees) -> Row:
    """A row in which every rank has a token: with a sequence of filling behind the given ones where one has none."""
    row, filling = Row(lengths, degrees), 0
    while not min(row.sizes):
        filling += degrees.size
        row = Row((*lengths, filling), degrees)
    return row
