"""Ring attention over packed sequences (arXiv 2310.01889), causal, with zigzag balance and sliding windows.

Keys and values go round the ring, a step at a time, while the block that is here is computed; results are merged by
their normalisers. In the backward pass they go round again, and their gradients follow one step behind until they are
home.
A rank's tokens are chunks of sequences (`kernels/zigzag.py`); of the same sequence, a chunk of queries sees a chunk of
keys whole, or causally (the same chunk), or through a window's edge, or not at all.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from swift_dist.kernels.lse_merge import lse_merge_
from swift_dist.kernels.zigzag import Chunk
from swift_dist.sequence_parallel import blocks
from swift_dist.sequence_parallel.blocks import Mask

Chunks = Sequence[Sequence[Chunk]]
Part = tuple[int, Chunk]
"""A chunk behind the place of its first token among all that its rank holds."""
_LEAST = 1024
"""Tokens: parts are not cut shorter for a short window."""


@dataclass(frozen=True)
class Block:
    """Queries [queries] and keys [keys] of what two ranks hold."""

    queries: slice
    keys: slice
    mask: Mask


def blocks_of(held: Sequence[Chunk], other: Sequence[Chunk], window: int | None, device: Any) -> Iterator[Block]:
    """What a rank's queries see of the keys that another (or itself) holds: as few and as large blocks as will do.

    Args:
        held, other: chunks of the queries and of the keys, in the order in which they are held: sequence by sequence,
            the parts of one in their order.
        window: tokens that a token sees, itself included; None: all before it.
    """
    parts, is_same = _by_sequence(other), held == other
    for sequence, queries in _by_sequence(held).items():
        keys = parts.get(sequence)
        if keys is None:
            continue
        if window is None or queries[-1][1].end - 1 - keys[0][1].begin < window:
            yield from _without_window(queries, keys, is_same=is_same)
        else:
            short = _cut(keys, window)
            ends = [k.end for _, k in short]
            for q in _cut(queries, window):
                near = short[bisect(ends, q[1].begin - window + 1) : bisect(ends, q[1].end)]
                yield from (block for k in near if (block := _block(q, k, window, device)) is not None)


def _by_sequence(chunks: Sequence[Chunk]) -> dict[int, list[Part]]:
    found: dict[int, list[Part]] = {}
    place = 0
    for chunk in chunks:
        found.setdefault(chunk.sequence, []).append((place, chunk))
        place += chunk.end - chunk.begin
    return found


def _without_window(queries: list[Part], keys: list[Part], *, is_same: bool) -> Iterator[Block]:
    """A rank's parts of a sequence lie side by side in their order: among themselves they are seen as one sequence is,
    and queries that see the same of another rank's parts make one block."""
    if is_same:
        whole = _span(queries)
        yield Block(whole, whole, Mask(causal=True))
        return
    for number, group in groupby(queries, lambda query: sum(key.begin < query[1].begin for _, key in keys)):
        if number:
            yield Block(_span(list(group)), _span(keys[:number]), Mask())


def _cut(parts: list[Part], window: int) -> list[Part]:
    """Parts about as long as the window: of a long one most would be computed only to be hidden, by a mask as large as
    its length squared."""
    size = max(window, _LEAST)
    return [
        (place + begin - part.begin, replace(part, begin=begin, end=min(begin + size, part.end)))
        for place, part in parts
        for begin in range(part.begin, part.end, size)
    ]


def _span(chunks: list[Part]) -> slice:
    place, last = chunks[-1]
    return slice(chunks[0][0], place + last.end - last.begin)


def _block(query: Part, key: Part, window: int, device: Any) -> Block | None:
    (q_place, q), (k_place, k) = query, key
    if k.begin > q.begin:
        return None
    same = k.begin == q.begin
    q_end = min(q.end, k.end - 1 + window)  # later queries see none of these keys,
    k_begin = max(k.begin, q.begin - window + 1)  # and earlier keys are seen by none of these queries
    if q_end <= q.begin or k_begin >= k.end:
        return None
    queries = slice(q_place, q_place + q_end - q.begin)
    keys = slice(k_place + k_begin - k.begin, k_place + k.end - k.begin)
    if q_end - 1 - k_begin < window:
        return Block(queries, keys, Mask(causal=same))
    distance = torch.arange(q.begin, q_end, device=device)[:, None] - torch.arange(k_begin, k.end, device=device)
    return Block(queries, keys, Mask(seen=(distance >= 0) & (distance < window)))


def ring_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chunks: Chunks,
    scale: float,
    window: int | None,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Causal attention of this rank's tokens to all tokens of their sequences.

    Args:
        query: [heads, t, d]; key, value: [key-value heads, t, d].
        chunks: of each rank of the ring.
        group: the ring.

    Returns:
        [heads, t, d].
    """
    result: torch.Tensor = _Ring.apply(query, key, value, chunks, scale, window, group)
    return result


class _Passing:
    """A tensor on its way to the next rank while the previous one's comes in.

    Every rank starts its passes in the same order, as NCCL wants it; on gloo `tag` keeps keys and values apart from
    gradients that are under way between the same two ranks.

    Args:
        tensor: [2, heads, tokens, d]; not to be changed before `arrived`.
        size: tokens that come in.
    """

    def __init__(self, tensor: torch.Tensor, size: int, group: dist.ProcessGroup, tag: int) -> None:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        after = dist.get_global_rank(group, (rank + 1) % ranks)
        before = dist.get_global_rank(group, (rank - 1) % ranks)
        some = (*tensor.shape[:2], 1, tensor.shape[3])  # a rank without tokens takes part, too
        self._size = size
        self._sent = tensor.contiguous() if tensor.shape[2] else tensor.new_zeros(some)
        self._coming = tensor.new_empty((*tensor.shape[:2], max(size, 1), tensor.shape[3]))
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self._sent, after, group, tag),
                dist.P2POp(dist.irecv, self._coming, before, group, tag),
            ]
        )

    def arrived(self) -> torch.Tensor:
        for work in self._works:
            work.wait()
        return self._coming[:, :, : self._size]


KEYS, GRADIENTS = 0, 1


def _tokens(chunks: Sequence[Chunk]) -> int:
    return sum(chunk.end - chunk.begin for chunk in chunks)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        chunks: Chunks,
        scale: float,
        window: int | None,
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        sizes = [_tokens(held) for held in chunks]
        wide = torch.promote_types(query.dtype, torch.float32)
        out = query.new_zeros(query.shape, dtype=wide)
        lse = torch.full(query.shape[:2], -torch.inf, dtype=wide, device=query.device)
        seen = 0  # queries before it have seen some keys, those behind it none
        here = torch.stack((key, value))
        for step in range(ranks):
            source, following = (rank - step) % ranks, (rank - step - 1) % ranks
            passing = _Passing(here, sizes[following], group, KEYS) if step < ranks - 1 else None
            for block in blocks_of(chunks[rank], chunks[source], window, query.device):
                q, (k, v) = block.queries, here[:, :, block.keys]
                piece = blocks.forward(query[:, q], k, v, block.mask, scale)
                if q.start >= seen:
                    out[:, q], lse[:, q] = piece
                else:
                    lse_merge_(out[:, q], lse[:, q], *piece)
                seen = max(seen, q.stop)
            here = passing.arrived() if passing is not None else here
        ctx.save_for_backward(query, key, value, out.to(query.dtype), lse)
        ctx.arguments = (chunks, scale, window, group)
        return out.to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        chunks, scale, window, group = ctx.arguments
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        sizes = [_tokens(held) for held in chunks]
        of_query = torch.zeros_like(query, dtype=lse.dtype)
        here = torch.stack((key, value))
        dout = dout.contiguous()
        coming: _Passing | None = None
        for step in range(ranks):
            source, following = (rank - step) % ranks, (rank - step - 1) % ranks
            passing = _Passing(here, sizes[following], group, KEYS) if step < ranks - 1 else None
            gradients = torch.zeros_like(here, dtype=lse.dtype)
            for block in blocks_of(chunks[rank], chunks[source], window, query.device):
                q, keys, (k, v) = block.queries, block.keys, here[:, :, block.keys]
                found = blocks.backward(dout[:, q], query[:, q], k, v, out[:, q], lse[:, q], block.mask, scale)
                of_query[:, q] += found[0]
                gradients[0][:, keys] += found[1]
                gradients[1][:, keys] += found[2]
            if coming is not None:  # what the ranks before found for these keys, sent while this rank computed
                gradients += coming.arrived()
            if ranks > 1:  # the last of the passes brings them home
                coming = _Passing(gradients, sizes[following], group, GRADIENTS)
            here = passing.arrived() if passing is not None else here
        of_key, of_value = gradients if coming is None else coming.arrived()
        return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype), *[None] * 4
