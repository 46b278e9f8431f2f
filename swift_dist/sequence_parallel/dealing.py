"""Which rank of a group holds which tokens of a row: short sequences whole, on one rank; long ones cut.

Ranks hold as many tokens as each other, but for one or two (where tiny rows are cut whole, a few more), and have as
much of causal attention to do, within `TOLERANCE`. What lies whole on a rank needs nobody else in attention, so of many
short sequences hardly any is cut, and ranks exchange next to nothing.

    1. The m longest sequences are cut evenly: zigzag over the ring (`kernels/zigzag.py`), each ring rank's tokens in
       contiguous pieces over its Ulysses ranks.
    2. The others, longest first, go to the rank with the most room left, if they fit.
    3. What fits nowhere fills up what room is left in each ring rank, in contiguous pieces.

m is the smallest of 0, 1, 2, ... (in larger steps later on) with which the work is balanced, or all sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from itertools import pairwise

from swift_dist.kernels.zigzag import Chunk, chunks_of
from swift_dist.sequence_parallel.degrees import Degrees

TOLERANCE = 1.1
"""Most work of a rank's attention, as a multiple of the mean. Attention is a part of a step, so the step is out of
balance by less."""


@dataclass(frozen=True)
class Deal:
    """Who holds what of a row.

    Args:
        whole: of each rank of the group, the numbers of the sequences that it alone holds, ascending.
        chunks: of each ring rank, its parts of the other sequences, in their order in the row.
        pieces: of each rank of the group, how many of its ring rank's tokens in `chunks` it holds.
    """

    whole: tuple[tuple[int, ...], ...]
    chunks: tuple[tuple[Chunk, ...], ...]
    pieces: tuple[int, ...]


def deal(lengths: Sequence[int], degrees: Degrees) -> Deal:
    """Deal the sequences of a row out to a group.

    Args:
        lengths: tokens of each sequence, in their order in the row.
        degrees: of the group.
    """
    longest_first = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    for cut in _counts(len(lengths)):
        found = _deal(lengths, longest_first, cut, degrees)
        if _is_balanced(found, lengths, degrees):
            break
    return found


def _counts(most: int) -> Iterator[int]:
    """0, 1, 2, ..., in steps of a quarter later on, and `most`."""
    cut = 0
    while cut < most:
        yield cut
        cut += max(1, cut // 4)
    yield most


def _deal(lengths: Sequence[int], longest_first: Sequence[int], cut: int, degrees: Degrees) -> Deal:
    """With the `cut` longest sequences cut evenly."""
    size, tokens = degrees.size, sum(lengths)
    chunks = _zigzag(lengths, sorted(longest_first[:cut]), degrees.ring)
    room = []
    for ring_rank, held in enumerate(chunks):
        first = ring_rank * degrees.ulysses
        ends = [tokens * (first + k) // size for k in range(degrees.ulysses + 1)]
        room += [
            end - begin - part
            for (begin, end), part in zip(pairwise(ends), _even(_tokens(held), degrees.ulysses), strict=True)
        ]
    whole: list[list[int]] = [[] for _ in range(size)]
    left = []
    most_room = [(-tokens, rank) for rank, tokens in enumerate(room)]
    heapify(most_room)
    for number in longest_first[cut:]:
        full, rank = most_room[0]
        if lengths[number] <= -full:
            whole[rank].append(number)
            heapreplace(most_room, (full + lengths[number], rank))
        else:
            left.append(number)
    of_ring = [0] * degrees.ring
    for full, rank in most_room:
        of_ring[rank // degrees.ulysses] -= full
    _fill(chunks, left, lengths, of_ring)
    pieces: list[int] = []
    for ring_rank, held in enumerate(chunks):
        held.sort(key=lambda chunk: (chunk.sequence, chunk.begin))
        ranks = whole[ring_rank * degrees.ulysses : (ring_rank + 1) * degrees.ulysses]
        pieces += _levelled(_tokens(held), [sum(lengths[number] for number in numbers) for numbers in ranks])
    return Deal(tuple(tuple(sorted(numbers)) for numbers in whole), tuple(map(tuple, chunks)), tuple(pieces))


def _zigzag(lengths: Sequence[int], numbers: Sequence[int], ring: int) -> list[list[Chunk]]:
    """Of each ring rank, its chunks of some sequences."""
    of_ranks = [chunks_of([lengths[number] for number in numbers], ring, rank) for rank in range(ring)]
    return [
        [Chunk(numbers[chunk.sequence], chunk.number, chunk.begin, chunk.end) for chunk in held] for held in of_ranks
    ]


def _fill(chunks: list[list[Chunk]], numbers: Sequence[int], lengths: Sequence[int], room: list[int]) -> None:
    """Cut sequences into what room ring ranks have, the most first, and add those chunks. The sequences together have
    as many tokens as there is room."""
    for number in numbers:
        begin, count = 0, 0
        while begin < lengths[number]:
            rank = max(range(len(room)), key=room.__getitem__)
            end = min(lengths[number], begin + room[rank])
            chunks[rank].append(Chunk(number, count, begin, end))
            room[rank] -= end - begin
            begin, count = end, count + 1


def _levelled(tokens: int, held: Sequence[int]) -> list[int]:
    """Cut `tokens` for ranks that hold some already so that they end up with as many as each other."""
    added = [max(0, part - had) for part, had in zip(_even(tokens + sum(held), len(held)), held, strict=True)]
    for _ in range(sum(added) - tokens):  # a rank held more than its part
        added[max(range(len(added)), key=added.__getitem__)] -= 1
    return added


def _even(tokens: int, parts: int) -> list[int]:
    return [end - begin for begin, end in pairwise(tokens * k // parts for k in range(parts + 1))]


def _tokens(chunks: Sequence[Chunk]) -> int:
    return sum(chunk.end - chunk.begin for chunk in chunks)


def _is_balanced(dealt: Deal, lengths: Sequence[int], degrees: Degrees) -> bool:
    """Of pairs of a query and a key: Ulysses ranks share those of their ring rank's chunks alike, head by head."""
    together = [
        sum(_pairs(chunk.end) - _pairs(chunk.begin) for chunk in held) / degrees.ulysses for held in dealt.chunks
    ]
    work = [
        together[rank // degrees.ulysses] + sum(_pairs(lengths[number]) for number in numbers)
        for rank, numbers in enumerate(dealt.whole)
    ]
    return max(work) * degrees.size <= TOLERANCE * sum(work)


def _pairs(tokens: int) -> int:
    return tokens * (tokens + 1) // 2
