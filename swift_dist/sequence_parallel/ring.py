"""Ring attention over packed sequences (arXiv 2310.01889), causal, with zigzag balance and sliding windows.

Keys and values go round the ring, a step at a time, while the block that is here is computed; results are merged by
their normalisers. In the backward pass they go round again, and their gradients travel with them until they are home.
A rank's tokens are chunks of sequences (`kernels/zigzag.py`); each pair of a chunk of queries and a chunk of keys of
the same sequence is seen whole, or causally (the same chunk), or through a window's edge, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from swift_dist.kernels.lse_merge import lse_merge
from swift_dist.kernels.zigzag import Chunk
from swift_dist.sequence_parallel import blocks
from swift_dist.sequence_parallel.blocks import Mask

Chunks = Sequence[Sequence[Chunk]]


@dataclass(frozen=True)
class Block:
    """Queries [queries] and keys [keys] of what two ranks hold."""

    queries: slice
    keys: slice
    mask: Mask


def blocks_of(held: Sequence[Chunk], other: Sequence[Chunk], window: int | None, device: Any) -> Iterator[Block]:
    """What a rank's queries see of the keys that another (or itself) holds.

    Args:
        held, other: chunks of the queries and of the keys, in the order in which they are held.
        window: tokens that a token sees, itself included; None: all before it.
    """
    starts: dict[int, list[tuple[int, Chunk]]] = {}
    place = 0
    for chunk in other:
        starts.setdefault(chunk.sequence, []).append((place, chunk))
        place += chunk.end - chunk.begin
    place = 0
    for chunk in held:
        for other_place, keys in starts.get(chunk.sequence, ()):
            block = _block(chunk, place, keys, other_place, window, device)
            if block is not None:
                yield block
        place += chunk.end - chunk.begin


def _block(q: Chunk, q_place: int, k: Chunk, k_place: int, window: int | None, device: Any) -> Block | None:
    if k.begin > q.begin:
        return None
    same = k.begin == q.begin
    q_end, k_begin = q.end, k.begin
    if window is not None:
        q_end = min(q_end, k.end - 1 + window)  # later queries see none of these keys,
        k_begin = max(k_begin, q.begin - window + 1)  # and earlier keys are seen by none of these queries
    if q_end <= q.begin or k_begin >= k.end:
        return None
    queries = slice(q_place, q_place + q_end - q.begin)
    keys = slice(k_place + k_begin - k.begin, k_place + k.end - k.begin)
    if window is None or q_end - 1 - k_begin < window:
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
    """Two tensors on their way to the next rank while those of the previous one come in."""

    def __init__(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], group: dist.ProcessGroup) -> None:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        after = dist.get_global_rank(group, (rank + 1) % ranks)
        before = dist.get_global_rank(group, (rank - 1) % ranks)
        self._sent = [tensor.contiguous() for tensor in tensors]
        self._coming = [
            tensor.new_empty((tensor.shape[0], size, tensor.shape[2]))
            for tensor, size in zip(tensors, sizes, strict=True)
        ]
        sends = [dist.P2POp(dist.isend, tensor, after, group) for tensor in self._sent]
        receives = [dist.P2POp(dist.irecv, tensor, before, group) for tensor in self._coming]
        self._works = dist.batch_isend_irecv(sends + receives)

    def arrived(self) -> list[torch.Tensor]:
        for work in self._works:
            work.wait()
        return self._coming


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
        out = query.new_zeros((query.shape[0], query.shape[1], value.shape[2]), dtype=wide)
        lse = torch.full(query.shape[:2], -torch.inf, dtype=wide, device=query.device)
        here = [key, value]
        for step in range(ranks):
            source, following = (rank - step) % ranks, (rank - step - 1) % ranks
            passing = _Passing(here, [sizes[following]] * 2, group) if step < ranks - 1 else None
            for block in blocks_of(chunks[rank], chunks[source], window, query.device):
                piece = blocks.forward(
                    query[:, block.queries], here[0][:, block.keys], here[1][:, block.keys], block.mask, scale
                )
                merged = lse_merge(out[:, block.queries], lse[:, block.queries], *piece)
                out[:, block.queries], lse[:, block.queries] = merged
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
        here = [key, value]
        gradients = [torch.zeros_like(tensor, dtype=lse.dtype) for tensor in here]
        dout = dout.contiguous()
        for step in range(ranks):
            source, following = (rank - step) % ranks, (rank - step - 1) % ranks
            passing = _Passing(here, [sizes[following]] * 2, group) if step < ranks - 1 else None
            for block in blocks_of(chunks[rank], chunks[source], window, query.device):
                q, k = block.queries, block.keys
                found = blocks.backward(
                    dout[:, q], query[:, q], here[0][:, k], here[1][:, k], out[:, q], lse[:, q], block.mask, scale
                )
                of_query[:, q] += found[0]
                gradients[0][:, k] += found[1]
                gradients[1][:, k] += found[2]
            if ranks > 1:  # the last of the passes brings them home
                gradients = _Passing(gradients, [sizes[following]] * 2, group).arrived()
            here = passing.arrived() if passing is not None else here
        return of_query.to(query.dtype), gradients[0].to(key.dtype), gradients[1].to(value.dtype), *[None] * 4
