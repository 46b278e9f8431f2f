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
_LARGE = ((8, 0), (9, 0), (10, 0), (10, 3))  # A100, H100 and H200, B200, B300


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
    if not _on_cuda(query):
        out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask.causal, attn_mask=_bias(mask, query), scale=scale
        )
        return out[0], lse[0]
    if _flash_does(query, mask):
        q, k, v = _padded(q, k, v)
        out, lse, *_ = _ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, mask.causal, False, scale=scale)
    else:
        q, k, v = _padded(q, *_repeated(q, k, v))
        out, lse, *_ = _ATEN._scaled_dot_product_efficient_attention(
            q, k, v, _aligned(_bias(mask, query), q), True, 0.0, mask.causal, scale=scale
        )
    # the efficient kernel rounds the number of queries up to a multiple of 32
    return out[0, ..., : query.shape[2]], lse[0, :, : query.shape[1]]


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
    if not _on_cuda(query):
        found = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            *held, 0.0, mask.causal, attn_mask=_bias(mask, query), scale=scale
        )
        return found[0][0], found[1][0], found[2][0]
    d, q, k, v, o, normaliser = held
    if _flash_does(query, mask):
        d, q, k, v, o = _padded(d, q, k, v, o)
        state = torch.empty(2, dtype=torch.uint64, device=query.device)  # of dropout's generator, which is not used
        dq, dk, dv = _ATEN._scaled_dot_product_flash_attention_backward(
            d, q, k, v, o, normaliser.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, mask.causal,
            state, state[0], scale=scale,
        )  # fmt: skip
    else:
        d, q, k, v, o = _padded(d, q, *_repeated(q, k, v), o)
        state = torch.empty((), dtype=torch.int64, device=query.device)
        padded = torch.nn.functional.pad(normaliser, (0, -normaliser.shape[-1] % 32), value=torch.inf).contiguous()
        dq, dk, dv, _ = _ATEN._scaled_dot_product_efficient_attention_backward(
            d, q, k, v, _aligned(_bias(mask, query), q), o, padded, state, state, 0.0,
            [True, True, True, False], mask.causal, scale=scale,
        )  # fmt: skip
        if key.shape[0] != query.shape[0]:
            dk, dv = (found.unflatten(1, (key.shape[0], -1)).sum(2) for found in (dk, dv))
    width = query.shape[2]
    return dq[0, ..., :width], dk[0, ..., :width], dv[0, ..., :width]


def _on_cuda(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


def _flash_does(query: torch.Tensor, mask: Mask) -> bool:
    """As torch itself chooses (sdp_utils.cpp): from compute capability 8.0, and of wide heads the gradient only where
    a multiprocessor has the memory."""
    if mask.seen is not None or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    capability = torch.cuda.get_device_capability(query.device)
    return capability >= (8, 0) and query.shape[2] <= (256 if capability in _LARGE else 192)


def _padded(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Heads filled up with zeros, which change nothing, to the multiple of 8 that both kernels read at a time. (torch
    does it a level above what is called here.)"""
    missing = -tensors[0].shape[-1] % 8
    return tensors if not missing else tuple(torch.nn.functional.pad(tensor, (0, missing)) for tensor in tensors)


def _repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One key-value head for each query head: the efficient kernel wants as many. (The others know groups.)"""
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
