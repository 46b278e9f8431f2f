"""The attention function of ranks that share rows, for transformers' attention interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from swift_dist.sequence_parallel import ring, ulysses
from swift_dist.sequence_parallel.group import SharedRow

NAME = "swift_dist_sequence_parallel"
Whole = Callable[..., tuple[torch.Tensor, Any]]


def register(whole: Whole) -> None:
    """Make the function known to transformers. (No mask function: models then build no mask at all.)

    Args:
        whole: attention of whole rows, where Ulysses alone shares them: called as transformers calls it, with the
            lengths of the row's sequences in the place of the mask.
    """
    from transformers import AttentionInterface

    def attend(*arguments: Any, **named: Any) -> tuple[torch.Tensor, None]:
        return shared_attention(whole, *arguments, **named)

    AttentionInterface.register(NAME, attend)


def shared_attention(
    whole: Whole,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    shared_row: SharedRow | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of this rank's tokens within their sequences, wherever the others of those are.

    Args:
        query: [1, heads, t, d]; key, value: [1, key-value heads, t, d], of this rank's tokens.
        shared_row: who holds what.

    Returns:
        ([1, t, heads, d_v], None).
    """
    if shared_row is None or query.shape[0] != 1 or shared_row.row.sizes[shared_row.ranks.rank] != query.shape[2]:
        raise RuntimeError(
            f"{type(module).__name__} does not hand on how its row is shared: --sequence_parallel_size 1 for this model"
        )
    if others.get("position_bias") is not None or attention_mask is not None or others.get("is_causal") is False:
        raise RuntimeError(f"{type(module).__name__} asks for more than causal attention: --sequence_parallel_size 1")
    ranks = shared_row.ranks
    heads = query.shape[1]
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [t, heads, d]
    if ranks.ulysses is not None:
        q, k, v = _exchange(q, k, v, shared_row)
        if s_aux is not None:
            s_aux = s_aux.view(ranks.degrees.ulysses, -1)[ranks.ulysses_rank]
    if ranks.ring is not None:
        if softcap is not None or s_aux is not None or dropout or value.shape[-1] != query.shape[-1]:
            raise RuntimeError(
                f"{type(module).__name__}'s attention (softcap, sinks, dropout or values of another width) cannot go "
                "round a ring: choose a --sequence_parallel_size that divides its heads"
            )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
        out = ring.ring_attention(q, k, v, shared_row.row.chunks, scale, sliding_window, ranks.ring).transpose(0, 1)
    else:
        held = [tensor.transpose(0, 1)[None] for tensor in (q, k, v)]
        out, _ = whole(
            module,
            *held,
            shared_row.row.lengths,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            softcap=softcap,
            s_aux=s_aux,
        )
        out = out[0]
    if ranks.ulysses is not None:
        out = ulysses.to_tokens(out, shared_row.pieces, ranks.ulysses)
    assert out.shape[:2] == (query.shape[2], heads)
    return out[None].contiguous(), None


def _exchange(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shared_row: SharedRow
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All of the ring rank's tokens, this rank's heads, in one exchange where queries, keys and values are as wide."""
    degree, group = shared_row.ranks.degrees.ulysses, shared_row.ranks.ulysses
    assert group is not None
    index = ulysses.heads_of_ranks(q.shape[1], k.shape[1], degree)
    if len(index) != k.shape[1]:
        chosen = torch.tensor(index, device=k.device)
        k, v = k.index_select(1, chosen), v.index_select(1, chosen)
    if q.shape[2] != v.shape[2]:
        exchanged = [ulysses.to_heads(tensor, shared_row.pieces, group) for tensor in (q, k, v)]
        return exchanged[0], exchanged[1], exchanged[2]
    by_rank = [tensor.reshape(len(tensor), degree, -1, tensor.shape[2]) for tensor in (q, k, v)]
    joined = torch.cat(by_rank, dim=2).flatten(1, 2)
    whole = ulysses.to_heads(joined, shared_row.pieces, group)
    parts = whole.split([tensor.shape[2] for tensor in by_rank], dim=1)
    return parts[0], parts[1], parts[2]
