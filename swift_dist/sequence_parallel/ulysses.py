"""Ulysses (arXiv 2309.14509): from some tokens with all heads to all tokens with some of the heads, and back.

One all-to-all each way; backward is the other one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


def heads_of_ranks(heads: int, kv_heads: int, ranks: int) -> list[int]:
    """The key-value heads to send, rank by rank: as many for each rank. With fewer key-value heads than ranks a head
    goes to several of them (and autograd adds its gradients up)."""
    if kv_heads % ranks == 0:
        return list(range(kv_heads))
    assert ranks % kv_heads == 0 and heads % ranks == 0
    return [rank * kv_heads // ranks for rank in range(ranks)]


def to_heads(
    tensors: Sequence[torch.Tensor], pieces: Sequence[int], group: dist.ProcessGroup
) -> tuple[torch.Tensor, ...]:
    """[t, heads, d] of this rank's tokens -> [T, heads / u, d] of this rank's heads, of several tensors at once.

    Args:
        tensors: of one width d, contiguous or not; the heads of each must be a multiple of the group's u ranks.
        pieces: tokens of each rank of the group; their sum is T.
        group: u ranks.
    """
    result: tuple[torch.Tensor, ...] = _ToHeads.apply(tuple(pieces), group, *tensors)
    return result


def to_tokens(x: torch.Tensor, pieces: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
    """The way back: [T, heads / u, d] -> [t, heads, d]."""
    result: torch.Tensor = _ToTokens.apply(x, tuple(pieces), group)
    return result


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pieces: tuple[int, ...], group: dist.ProcessGroup, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.pieces, ctx.group = pieces, group
        ctx.heads = [tensor.shape[1] // len(pieces) for tensor in tensors]
        return _heads(tensors, pieces, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        return None, None, *_tokens(torch.cat(gradients, dim=1), ctx.heads, ctx.pieces, ctx.group)


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, pieces: tuple[int, ...], group: dist.ProcessGroup) -> torch.Tensor:
        ctx.pieces, ctx.group = pieces, group
        return _tokens(x, [x.shape[1]], pieces, group)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _heads([gradient], ctx.pieces, ctx.group)[0], None, None


def _heads(
    tensors: Sequence[torch.Tensor], pieces: tuple[int, ...], group: dist.ProcessGroup
) -> tuple[torch.Tensor, ...]:
    ranks, (tokens, _, width) = len(pieces), tensors[0].shape
    heads = [tensor.shape[1] // ranks for tensor in tensors]
    # what goes to each rank is one block; copied once, straight to its place
    sent = tensors[0].new_empty((ranks, tokens, sum(heads), width))
    for place, tensor in zip(sent.split(heads, dim=2), tensors, strict=True):
        place.copy_(tensor.reshape(tokens, ranks, place.shape[2], width).transpose(0, 1))
    whole = sent.new_empty((sum(pieces), sum(heads), width))
    dist.all_to_all_single(whole, sent.flatten(0, 1), list(pieces), [tokens] * ranks, group=group)
    return whole.split(heads, dim=1)


def _tokens(
    x: torch.Tensor, heads: Sequence[int], pieces: tuple[int, ...], group: dist.ProcessGroup
) -> list[torch.Tensor]:
    """[T, sum of heads, d] -> [t, u heads, d] each."""
    ranks, mine, width = len(pieces), pieces[dist.get_rank(group)], x.shape[2]
    got = x.new_empty((ranks * mine, x.shape[1], width))
    dist.all_to_all_single(got, x.contiguous(), [mine] * ranks, list(pieces), group=group)
    parts = got.view(ranks, mine, x.shape[1], width).transpose(0, 1).split(list(heads), dim=2)
    return [part.reshape(mine, ranks * part.shape[2], width) for part in parts]
