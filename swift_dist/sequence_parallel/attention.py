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
    named = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
    row, ranks = shared_row.row, shared_row.ranks
    if ranks.ring is not None and (
        softcap is not None or s_aux is not None or dropout or value.shape[-1] != query.shape[-1]
    ):
        raise RuntimeError(
            f"{type(module).__name__}'s attention (softcap, sinks, dropout or values of another width) cannot go "
            "round a ring: choose a --sequence_parallel_size that divides its heads"
        )
    alone = row.whole_lengths(ranks.rank)
    held = [query, key, value]
    found = []
    if row.cut_lengths:  # every rank takes part, also one that holds none of their tokens
        cut = held
        if alone:
            sizes = [query.shape[2] - sum(alone), sum(alone)]
            cut, held = map(list, zip(*(tensor.split(sizes, dim=2) for tensor in held), strict=True))
        found.append(_together(whole, module, cut, shared_row, s_aux, named))
    if alone:
        found.append(whole(module, *held, alone, s_aux=s_aux, **named)[0])
    out = found[0] if len(found) == 1 else torch.cat(found, dim=1)
    assert out.shape[1:3] == (query.shape[2], query.shape[1])
    return out, None


def _together(
    whole: Whole,
    module: torch.nn.Module,
    held: list[torch.Tensor],
    shared_row: SharedRow,
    s_aux: torch.Tensor | None,
    named: dict[str, Any],
) -> torch.Tensor:
    """Attention of this rank's parts of the sequences that are cut. [1, heads, t, d] each -> [1, t, heads, d_v]."""
    row, ranks = shared_row.row, shared_row.ranks
    if ranks.ulysses is not None:
        held = [tensor.transpose(0, 1)[None] for tensor in _exchanged(held, shared_row)]
        if s_aux is not None:
            s_aux = s_aux.view(ranks.degrees.ulysses, -1)[ranks.ulysses_rank]
    if ranks.ring is not None:
        scale = held[0].shape[-1] ** -0.5 if named["scaling"] is None else named["scaling"]
        q, k, v = (tensor[0] for tensor in held)
        out = ring.ring_attention(q, k, v, row.chunks, scale, named["sliding_window"], ranks.ring).transpose(0, 1)
    else:
        out = whole(module, *held, row.cut_lengths, s_aux=s_aux, **named)[0][0]
    if ranks.ulysses is not None:
        out = ulysses.to_tokens(out, shared_row.pieces, ranks.ulysses)
    return out[None].contiguous()


def _exchanged(held: list[torch.Tensor], shared_row: SharedRow) -> tuple[torch.Tensor, ...]:
    """[1, heads, t, d] each -> [T, heads / u, d]: all of the ring rank's tokens, this rank's heads; in one exchange
    where queries, keys and values are as wide."""
    degree, group = shared_row.ranks.degrees.ulysses, shared_row.ranks.ulysses
    assert group is not None
    q, k, v = (tensor[0].transpose(0, 1) for tensor in held)
    index = ulysses.heads_of_ranks(q.shape[1], k.shape[1], degree)
    if len(index) != k.shape[1]:
        chosen = torch.tensor(index, device=k.device)
        k, v = k.index_select(1, chosen), v.index_select(1, chosen)
    if q.shape[2] == v.shape[2]:
        return ulysses.to_heads([q, k, v], shared_row.pieces, group)
    return *ulysses.to_heads([q, k], shared_row.pieces, group), *ulysses.to_heads([v], shared_row.pieces, group)
