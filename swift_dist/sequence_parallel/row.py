"""Which rank of a group holds which tokens of a micro-batch's row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from swift_dist.kernels.zigzag import Chunk
from swift_dist.sequence_parallel.dealing import Deal, deal
from swift_dist.sequence_parallel.degrees import Degrees


@dataclass(frozen=True)
class Row:
    """A row of sequences dealt out (`dealing.py`). A rank holds first its piece of its ring rank's chunks, in their
    order, and behind it the sequences that it alone holds.

    Args:
        lengths: tokens of each sequence, in their order in the row.
        degrees: of the group.
    """

    lengths: tuple[int, ...]
    degrees: Degrees

    @cached_property
    def _dealt(self) -> Deal:
        return deal(self.lengths, self.degrees)

    @property
    def chunks(self) -> tuple[tuple[Chunk, ...], ...]:
        """Of each ring rank, parts of the sequences that are cut, in the order in which it holds them."""
        return self._dealt.chunks

    @cached_property
    def cut_lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence that is cut, in their order in the row."""
        numbers = {chunk.sequence for held in self.chunks for chunk in held}
        return tuple(self.lengths[number] for number in sorted(numbers))

    def pieces(self, ring_rank: int) -> tuple[int, ...]:
        """Tokens of each Ulysses rank of a ring rank's chunks."""
        first = ring_rank * self.degrees.ulysses
        return self._dealt.pieces[first : first + self.degrees.ulysses]

    def whole_lengths(self, rank: int) -> tuple[int, ...]:
        """Tokens of each sequence that a rank of the group alone holds, in the order in which it holds them."""
        return tuple(self.lengths[number] for number in self._dealt.whole[rank])

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each rank of the group."""
        return tuple(piece + sum(self.whole_lengths(rank)) for rank, piece in enumerate(self._dealt.pieces))

    def of(self, rank: int) -> torch.Tensor:
        """int64 [t]: where the tokens of a rank of the group stand in the row."""
        ring_rank, ulysses_rank = divmod(rank, self.degrees.ulysses)
        pieces = self.pieces(ring_rank)
        cut = [
            torch.arange(self._starts[c.sequence] + c.begin, self._starts[c.sequence] + c.end)
            for c in self.chunks[ring_rank]
        ]
        piece = torch.cat(cut)[sum(pieces[:ulysses_rank]) :][: pieces[ulysses_rank]] if cut else torch.arange(0)
        whole = [torch.arange(self._starts[number], self._starts[number + 1]) for number in self._dealt.whole[rank]]
        return torch.cat([piece, *whole])

    @cached_property
    def order(self) -> torch.Tensor:
        """int64 [T]: the tokens of rank 0, then those of rank 1, ..."""
        return torch.cat([self.of(rank) for rank in range(self.degrees.size)])

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        """Where each sequence begins in the row, and the end of the last."""
        return tuple(accumulate(self.lengths, initial=0))


def row_for_all(lengths: tuple[int, ...], degrees: Degrees) -> Row:
    """A row in which every rank has a token: with a sequence of filling behind the given ones where one has none."""
    row, filling = Row(lengths, degrees), 0
    while not min(row.sizes):
        filling += degrees.size
        row = Row((*lengths, filling), degrees)
    return row
