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


def to_heads(x: torch.Tensor, pieces: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
    """[t, heads, d] of this rank's tokens -> [T, heads / u, d] of this rank's heads.

    Args:
        x: contiguous or not; heads must be a multiple of the group's u ranks.
        pieces: tokens of each rank of the group; their sum is T.
        group: u ranks.
    """
    result: torch.Tensor = _ToHeads.apply(x, tuple(pieces), group)
    return result


def to_tokens(x: torch.Tensor, pieces: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
    """The way back: [T, heads / u, d] -> [t, heads, d]."""
    result: torch.Tensor = _ToTokens.apply(x, tuple(pieces), group)
    return result


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, pieces: tuple[int, ...], group: dist.ProcessGroup) -> torch.Tensor:
        ctx.pieces, ctx.group = pieces, group
        return _heads(x, pieces, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _tokens(gradient, ctx.pieces, ctx.group), None, None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, pieces: tuple[int, ...], group: dist.ProcessGroup) -> torch.Tensor:
        ctx.pieces, ctx.group = pieces, group
        return _tokens(x, pieces, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _heads(gradient, ctx.pieces, ctx.group), None, None


def _heads(x: torch.Tensor, pieces: tuple[int, ...], group: dist.ProcessGroup) -> torch.Tensor:
    ranks = len(pieces)
    tokens, heads, width = x.shape
    # [u, t, heads / u, d]: what goes to each rank is one block
    sent = x.reshape(tokens, ranks, heads // ranks, width).transpose(0, 1).contiguous()
    whole = x.new_empty((sum(pieces), heads // ranks, width))
    dist.all_to_all_single(whole, sent.view(-1, heads // ranks, width), list(pieces), [tokens] * ranks, group=group)
    return whole


def _tokens(x: torch.Tensor, pieces: tuple[int, ...], group: dist.ProcessGroup) -> torch.Tensor:
    ranks, mine = len(pieces), pieces[dist.get_rank(group)]
    _, heads, width = x.shape
    got = x.new_empty((ranks * mine, heads, width))
    dist.all_to_all_single(got, x.contiguous(), [mine] * ranks, list(pieces), group=group)
    return got.view(ranks, mine, heads, width).transpose(0, 1).reshape(mine, ranks * heads, width)
