"""Attention of some queries to some keys, with its normaliser, and backwards given the normaliser of ALL keys.

    S = scale Q K^T (masked),  lse = log sum exp S,  O = exp(S - lse) V
    P = exp(S - lse_all),  D = rowsum(dO O_all)
    dV = P^T dO,  dS = P (dO V^T - D),  dQ = scale dS K,  dK = scale dS^T Q

The second line is flash attention's backward (arXiv 2205.14135): given the merged lse and O of a ring it yields this
block's share of every gradient, so shares add up. torch's own kernels take lse as an argument, on CPU and CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Mask:
    """What a block's queries see of its keys: all, where neither is set.

    Args:
        causal: query i sees keys 0 to i (as many queries as keys).
        seen: bool [queries, keys]; each query sees a key.
    """

    causal: bool = False
    seen: torch.Tensor | None = None


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Mask, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(O, lse).

    Args:
        query: [heads, q, d]; key, value: [key-value heads, k, d].

    Returns:
        [heads, q, d] of query's dtype, float32 (float64) [heads, q].
    """
    q, k, v = query[None], key[None], value[None]
    if not query.is_cuda:
        out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask.causal, attn_mask=_bias(mask, query), scale=scale
        )
        return out[0], lse[0]
    k, v = _repeated(q, k, v)
    if _flash_does(query, mask):
        out, lse, *_ = _ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, mask.causal, False, scale=scale)
    else:
        out, lse, *_ = _ATEN._scaled_dot_product_efficient_attention(
            q, k, v, _aligned(_bias(mask, query), q), True, 0.0, mask.causal, scale=scale
        )
    return out[0], lse[0, :, : query.shape[1]]


def backward(
    dout: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: Mask,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dQ, dK, dV): this block's share.

    Args:
        dout, out: [heads, q, d], of all keys. lse: [heads, q], of all keys.
    """
    held = [tensor[None] for tensor in (dout, query, key, value, out, lse)]
    if not query.is_cuda:
        found = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            *held, 0.0, mask.causal, attn_mask=_bias(mask, query), scale=scale
        )
        return found[0][0], found[1][0], found[2][0]
    d, q, k, v, o, normaliser = held
    kv_heads = k.shape[1]
    k, v = _repeated(q, k, v)
    if _flash_does(query, mask):
        state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of dropout's generator, which is not used
        dq, dk, dv = _ATEN._scaled_dot_product_flash_attention_backward(
            d, q, k, v, o, normaliser.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, mask.causal,
            state, state[:0], scale=scale,
        )  # fmt: skip
    else:
        state = torch.zeros((), dtype=torch.int64, device=query.device)
        padded = torch.nn.functional.pad(normaliser, (0, -normaliser.shape[-1] % 32), value=torch.inf).contiguous()
        dq, dk, dv, _ = _ATEN._scaled_dot_product_efficient_attention_backward(
            d, q, k, v, _aligned(_bias(mask, query), q), o, padded, state, state, 0.0,
            [True, True, True, False], mask.causal, scale=scale,
        )  # fmt: skip
    shape = (kv_heads, -1, *dk.shape[2:])
    return dq[0], dk[0].reshape(shape).sum(1), dv[0].reshape(shape).sum(1)


def _flash_does(query: torch.Tensor, mask: Mask) -> bool:
    return mask.seen is None and query.dtype in (torch.float16, torch.bfloat16)


def _repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One key-value head for each query head: CUDA's kernels want as many. (CPU's knows groups.)"""
    groups = q.shape[1] // k.shape[1]
    return (k, v) if groups == 1 else (k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))


def _bias(mask: Mask, query: torch.Tensor) -> torch.Tensor | None:
    if mask.seen is None:
        return None
    return torch.zeros(mask.seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask.seen, -torch.inf)


def _aligned(bias: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    """The efficient kernel reads a bias whose rows begin at multiples of 16 elements, for every head."""
    if bias is None:
        return None
    rows, columns = bias.shape
    wide = bias.new_zeros((rows, -(-columns // 16) * 16))
    wide[:, :columns] = bias
    return wide[:, :columns].expand(1, q.shape[1], rows, columns)
