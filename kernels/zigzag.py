"""Dealing a row of packed sequences out to the ranks of a ring, so that each has as much of causal attention to do.

A token's attention costs as many keys as stand before it. Each sequence is cut into 2 R chunks, and rank r takes chunks
r and 2 R - 1 - r of it: one cheap, one dear (Megatron's context parallelism and zigzag ring attention do the same).
Sequences need not be multiples of 2 R: chunk k of a sequence of L tokens whose first token is number `start` of the row
is

    [floor((k L + phase) / 2R), floor(((k + 1) L + phase) / 2R)),  phase = start mod 2R

so chunks differ by one token at most, and the odd tokens of many short sequences go round the ranks.

The megatron engine's ranks must hold as many tokens each, to the token: there a whole sample is cut, whatever sequences
it is made of (`pieces_of`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from swift_dist.kernels._triton import Backend, jit, on_triton, power_of_two, tl

_ROWS, _COLUMNS = 8, 1024


@dataclass(frozen=True)
class Chunk:
    """Tokens [begin, end) of sequence `sequence`, counted from its own first token; chunk `number` of 2 R."""

    sequence: int
    number: int
    begin: int
    end: int


def chunks_of(lengths: Sequence[int], ring: int, rank: int) -> list[Chunk]:
    """What a rank holds, in the order in which it holds it: sequence by sequence, the early chunk first. Empty chunks
    are left out.

    Args:
        lengths: tokens of each sequence of the row.
        ring: ranks, R.
        rank: 0 <= rank < R.
    """
    found, start = [], 0
    for sequence, length in enumerate(lengths):
        found += [Chunk(sequence, *part) for part in parts_of(length, ring, rank, start)]
        start += length
    return found


def parts_of(length: int, ring: int, rank: int, start: int = 0) -> list[tuple[int, int, int]]:
    """(number, begin, end) of a rank's two chunks of one sequence, the early one first; empty ones are left out. Where
    2 R divides both arguments, chunks are as long as each other.

    Args:
        length: of the sequence; start: number of its first token in the row.
    """
    parts = 2 * ring
    phase = start % parts
    ends = [
        (number, *((k * length + phase) // parts for k in (number, number + 1))) for number in (rank, parts - 1 - rank)
    ]
    return [(number, begin, end) for number, begin, end in ends if end > begin]


def pieces_of(samples: Sequence[Sequence[int]], ring: int, rank: int) -> list[Chunk]:
    """What a rank holds of samples that are each cut as a whole, in the order in which it holds it: its two parts of
    a sample, which end wherever a sequence ends. What it holds of a sequence lies side by side. Sequences are numbered
    through, over all samples.

    Args:
        samples: tokens of each sequence of each sample.
    """
    found: list[Chunk] = []
    first = 0
    for lengths in samples:
        starts = [0, *accumulate(lengths)]
        for number, begin, end in parts_of(starts[-1], ring, rank):
            for sequence, (start, stop) in enumerate(pairwise(starts)):
                low, high = max(begin, start), min(end, stop)
                if low < high:
                    found.append(Chunk(first + sequence, number, low - start, high - start))
        first += len(lengths)
    return found


def positions(lengths: Sequence[int], ring: int, rank: int) -> torch.Tensor:
    """int64 [t]: where the tokens of a rank stand in the row."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    held = [
        torch.arange(starts[chunk.sequence] + chunk.begin, starts[chunk.sequence] + chunk.end)
        for chunk in chunks_of(lengths, ring, rank)
    ]
    return torch.cat(held) if held else torch.empty(0, dtype=torch.int64)


def order(lengths: Sequence[int], ring: int) -> torch.Tensor:
    """int64 [T]: the tokens of rank 0, then those of rank 1, ...; ``row[order]`` is what `torch.split` deals out."""
    return torch.cat([positions(lengths, ring, rank) for rank in range(ring)])


def shard(
    row: torch.Tensor, lengths: Sequence[int], ring: int, rank: int, *, backend: Backend = "auto"
) -> torch.Tensor:
    """A rank's tokens. [T, ...] -> [t, ...]; differentiable (the other ranks' tokens get a gradient of 0)."""
    index = positions(lengths, ring, rank).to(row.device)
    result: torch.Tensor = _Take.apply(row, index, on_triton(backend, row))
    return result


def unshard(shards: Sequence[torch.Tensor], lengths: Sequence[int], *, backend: Backend = "auto") -> torch.Tensor:
    """The row of all ranks' tokens. Each [t, ...] -> [T, ...]; differentiable."""
    whole = torch.cat(list(shards))
    back = torch.argsort(order(lengths, len(shards))).to(whole.device)
    result: torch.Tensor = _Take.apply(whole, back, on_triton(backend, whole))
    return result


class _Take(torch.autograd.Function):
    """``source[index]`` of an index that names no row twice; backward writes each row once."""

    @staticmethod
    def forward(ctx: Any, source: torch.Tensor, index: torch.Tensor, kernel: bool) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.rows, ctx.kernel = len(source), kernel
        if not kernel:
            return source.index_select(0, index)
        out = source.new_empty((len(index), *source.shape[1:]))
        _copy(source.contiguous(), out, index, scatters=False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (index,) = ctx.saved_tensors
        result = gradient.new_zeros((ctx.rows, *gradient.shape[1:]))
        if ctx.kernel:
            _copy(gradient.contiguous(), result, index, scatters=True)
        else:
            result.index_copy_(0, index, gradient)
        return result, None, None


def _copy(source: torch.Tensor, target: torch.Tensor, index: torch.Tensor, *, scatters: bool) -> None:
    width = source[0].numel() if len(source) else 0
    if not len(index) or not width:
        return
    block = min(_COLUMNS, power_of_two(width))
    _copy_kernel[(-(-len(index) // _ROWS), -(-width // block))](
        source, target, index, len(index), width, SCATTERS=scatters, ROWS=_ROWS, BLOCK=block
    )


@jit
def _copy_kernel(source, target, index, rows, width, SCATTERS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = row < rows
    other = tl.load(index + row, mask=there, other=0)
    inside = there[:, None] & (column < width)[None, :]
    read, write = other, row
    if SCATTERS:
        read, write = row, other
    value = tl.load(source + read[:, None] * width + column[None, :], mask=inside)
    tl.store(target + write[:, None] * width + column[None, :], value, mask=inside)
