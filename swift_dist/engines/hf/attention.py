"""Attention over sequences that lie side by side in one row, none of which sees another.

transformers' models call whatever function is registered under the name that their config states, with the keyword
arguments that the model itself was called with. `packed_attention` takes from them where the sequences begin and end;
a model that does not hand them on gets an error, never one long sequence.

    O_s = softmax(scale Q_s K_s^T + mask) V_s    for each sequence s on its own

On CUDA in half precision one kernel does all sequences (torch.nn.attention.varlen); elsewhere
`scaled_dot_product_attention` does one after the other: no [T, T] mask of the row exists, and no work is spent on what
it would hide. Quadratic in a sequence's length are its mask where a window meets no such kernel (CPU, fp32), and the
scores of all heads where softcaps or sinks do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from swift_dist.sequence_parallel.limits import PLAIN_LAYERS

NAME = "swift_dist_packed"


@dataclass(frozen=True)
class Lengths:
    """Tokens of each sequence of a row. An object, because torch.compile would make a program for each length of a
    tuple."""

    values: tuple[int, ...]


def register(*, is_compiled: bool = False) -> None:
    """Make the function known to transformers. (No mask function: models then build no mask at all.)

    Args:
        is_compiled: layers are, and this function within them is not: its loop would be unrolled for each number of
            sequences.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, torch.compiler.disable(packed_attention) if is_compiled else packed_attention)


def attend_whole_rows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    **named: Any,
) -> tuple[torch.Tensor, None]:
    """`packed_attention` of a row that ranks share, with all tokens of some of the heads here."""
    return packed_attention(module, query, key, value, None, **named, **boundaries(list(lengths), query.device))


def boundaries(lengths: list[int], device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a model's forward that say where the sequences of a row lie.

    Args:
        lengths: tokens of each sequence, in their order in the row.
        device: of the row.
    """
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
    longest = max(lengths)
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
        "sequence_lengths": Lengths(tuple(lengths)),
    }


def refusal(model: Any) -> str | None:
    """Why a model's sequences cannot lie side by side in one row; None: they can."""
    import inspect

    config = model.config.get_text_config()
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention cannot be replaced through transformers' attention interface"
    kinds = set(getattr(config, "layer_types", None) or ()) - PLAIN_LAYERS
    if kinds:
        return f"its {', '.join(sorted(kinds))} layers carry state from one sequence into the next"
    recurrent = [name for name in ("mamba", "conv1d", "recurrent", "rwkv", "linear_attn") if _has(model, name)]
    if recurrent:
        return f"its {', '.join(recurrent)} layers carry state from one sequence into the next"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward takes no position_ids"
    if any(
        name.endswith("position_embeddings") and module.padding_idx is not None for name, module in _embeddings(model)
    ):
        return "its positions do not begin at 0 (RoBERTa's begin behind the padding token)"
    return None


def _embeddings(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Embedding]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding))


def _has(model: torch.nn.Module, part: str) -> bool:
    return any(part in name.lower() for name, _ in model.named_modules())


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    sequence_lengths: Lengths | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence of a row.

    Args:
        query: [1, heads, T, d]; key, value: [1, key-value heads, T, d].
        sequence_lengths: their sum is T.
        sliding_window: tokens that a token sees, itself included.
        softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma 2).
        s_aux: [heads], a score that takes part in the softmax and has no value (attention sinks, gpt-oss).

    Returns:
        ([1, T, heads, d_v], None), as transformers' own functions.
    """
    if sequence_lengths is None or sum(sequence_lengths.values) != query.shape[2] or query.shape[0] != 1:
        raise RuntimeError(
            f"{type(module).__name__} does not hand on where packed sequences lie: --data.padding_free false, and no "
            "data.packing, for this model"
        )
    if others.get("position_bias") is not None or attention_mask is not None or is_causal is False:
        raise RuntimeError(f"{type(module).__name__} asks for more than causal attention: --data.padding_free false")
    groups = query.shape[1] // key.shape[1]
    on_kernel = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    if on_kernel and softcap is None and s_aux is None and not dropout and key.shape[-1] == value.shape[-1]:
        assert cu_seq_lens_q is not None and max_length_q is not None, "they come with sequence_lengths"
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    on_groups = not query.is_cuda and softcap is None and s_aux is None  # of CUDA's, only kernels in half precision do
    if groups > 1 and not on_groups:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    parts = []
    for q, k, v in zip(*(tensor.split(sequence_lengths.values, dim=2) for tensor in (query, key, value)), strict=True):
        window = sliding_window if sliding_window is not None and sliding_window < q.shape[2] else None
        if softcap is None and s_aux is None:
            mask = None if window is None else _mask(q.shape[2], window, q.device)
            parts.append(
                F.scaled_dot_product_attention(
                    q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=groups > 1 and on_groups
                )
            )
        else:
            parts.append(_explicit(q, k, v, window, dropout, scaling, softcap, s_aux))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _mask(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[length, length], True where a token (row) sees another."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """[1, heads, T, d] -> [1, T, heads, d] by torch's kernel for sequences of differing lengths."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    # (left, right): tokens seen beside itself; (-1, 0) is plain causal attention
    sizes = (-1 if window is None else window - 1, 0)
    out = varlen_attn(
        q, k, v, ends, ends, longest, longest, scale=scaling, window_size=sizes, enable_gqa=q.shape[1] != k.shape[1]
    )
    assert isinstance(out, torch.Tensor)
    return out[None]


def _explicit(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """The formula as it stands, for what no kernel does."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_mask(query.shape[2], window, query.device), torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return F.dropout(weights, dropout) @ value
