"""Core attention on torch's own kernels, for machines without transformer-engine and for documents kept apart.

Causal, grouped queries, sliding window, dropout, context parallelism, samples of several documents that do not see one
another. Context parallelism cuts a sample of S tokens into 2C chunks of which rank r holds chunks r and 2C-1-r
(`kernels/zigzag.py`), so that all ranks hold as many tokens and have about as much causal work.

Ranks that share a sample pass keys and values round a ring (`sequence_parallel/ring.py`): nobody holds all of them, and
no mask of a sample's size exists. Dropout cannot be merged from block to block: with it, keys and values are gathered
over the group (their gradients are reduce-scattered), and every rank computes attention for its two chunks.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention

from swift_dist.kernels.zigzag import Chunk, parts_of, pieces_of
from swift_dist.sequence_parallel.ring import ring_attention


class DotProductAttention(MegatronModule):
    """softmax(Q K^T * scale) V with a causal mask.

    Has the constructor and the call of megatron's core attention modules. Query [s, b, n, d], key and value
    [s, b, g, d] with n a multiple of g (n, g: heads and groups of this tensor-parallel rank); returns [s, b, n*d].
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal, f"only causal attention is built here, not {attn_mask_type}"
        assert config.softmax_type == "vanilla", f"softmax type {config.softmax_type} needs transformer-engine"
        assert not config.apply_query_key_layer_scaling, "query-key layer scaling needs transformer-engine"
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.cp_group = pg_collection.cp if pg_collection is not None else None
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        # (left, right) as in transformer-engine: query i sees keys i-left ... i+right; -1 means without limit.
        self.window = config.window_size[0] if windowed else -1

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """
        Args:
            attention_mask: None, or the documents of each whole sample: int64 [b, D] on the CPU, their lengths, 0
                behind the last. (Megatron hands this argument on to every layer, recomputed or not; what it is named
                after is causal anyway.)
        """
        assert attention_bias is None and packed_seq_params is None, "biases and packed sequences are not built here"
        if self.dropout == 0.0 or not self.training or self.config.sequence_parallel:
            # Under sequence parallelism the whole layer already runs in the tensor-parallel generator's context.
            return self._attend(query, key, value, attention_mask)
        with get_cuda_rng_tracker().fork():  # other heads, other dropout: the tensor-parallel ranks must differ
            return self._attend(query, key, value, attention_mask)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: torch.Tensor | None
    ) -> torch.Tensor:
        group = self.cp_group
        size, rank = (group.size(), group.rank()) if group is not None else (1, 0)
        if documents is None and size == 1:
            return self._attend_chunk(query, key, value, 0, None)
        if self.dropout == 0.0 or not self.training:
            samples = _lengths(documents, query.shape[1], query.shape[0] * size)
            return self._attend_round_the_ring(query, key, value, samples)
        if group is not None and size > 1:
            keys_values = gather_in_order(torch.cat((key, value), dim=-1), group)
            key, value = keys_values.split((key.shape[-1], value.shape[-1]), dim=-1)
        numbers = None if documents is None else _numbers(documents, key.shape[0]).to(query.device)
        outputs, place = [], 0
        for _, begin, end in parts_of(key.shape[0], size, rank):
            queries = query[place : place + end - begin]
            # keys from `end` on are in the future of the whole chunk
            outputs.append(self._attend_chunk(queries, key[:end], value[:end], begin, numbers))
            place += end - begin
        return torch.cat(outputs)

    def _attend_round_the_ring(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, samples: tuple[tuple[int, ...], ...]
    ) -> torch.Tensor:
        """Samples lie one after the other in one row: [s, b, n, d] -> [n, b*s, d], and back to [s, b, n*d]."""
        assert self.cp_group is not None, "made without process groups"
        length, batch, heads, _ = query.shape
        q, k, v = (tensor.permute(2, 1, 0, 3).flatten(1, 2) for tensor in (query, key, value))
        pieces = _pieces(samples, self.cp_group.size())
        window = None if self.window < 0 else self.window + 1
        output = ring_attention(q, k, v, pieces, self.scale, window, self.cp_group)
        return output.view(heads, batch, length, -1).permute(2, 1, 0, 3).reshape(length, batch, -1)

    def _attend_chunk(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        start: int,
        numbers: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of the queries at positions start, start+1, ... to the keys from position 0 on: of all, or of the
        same document, whose number is given for each token of the samples [b, S]."""
        num_queries, num_keys = query.shape[0], key.shape[0]
        plain = numbers is None and start == 0 and (self.window < 0 or self.window >= num_keys - 1)
        mask = None if plain else _mask(num_queries, num_keys, start, self.window, query.device)
        if numbers is not None:
            same = numbers[:, start : start + num_queries, None] == numbers[:, None, :num_keys]
            assert mask is not None
            mask = (mask & same)[:, None]
        output = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=plain,
            scale=self.scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return output.permute(2, 0, 1, 3).reshape(num_queries, query.shape[1], -1)  # [b, n, s, d] -> [s, b, n*d]


def documents_of(position_ids: torch.Tensor) -> torch.Tensor:
    """Whole samples' positions [b, S], which begin at 0 in each document -> the documents' lengths, int64 [b, D], 0
    behind a sample's last."""
    begins = position_ids == 0
    begins[:, 0] = True
    numbers = begins.cumsum(1) - 1
    lengths = torch.zeros(len(begins), int(numbers.max()) + 1, dtype=torch.int64)
    return lengths.scatter_add_(1, numbers, torch.ones_like(numbers))


def _numbers(documents: torch.Tensor, length: int) -> torch.Tensor:
    """The document of each token: lengths [b, D] -> int64 [b, S]."""
    number = torch.arange(documents.shape[1])
    return torch.stack([number.repeat_interleave(lengths, output_size=length) for lengths in documents])


def _lengths(documents: torch.Tensor | None, batch: int, length: int) -> tuple[tuple[int, ...], ...]:
    if documents is None:
        return ((length,),) * batch
    return tuple(tuple(filter(None, lengths)) for lengths in documents.tolist())


@lru_cache(maxsize=16)
def _pieces(samples: tuple[tuple[int, ...], ...], ranks: int) -> tuple[tuple[Chunk, ...], ...]:
    """What each rank of a ring holds; the layers of a micro-batch ask for the same."""
    return tuple(tuple(pieces_of(samples, ranks, rank)) for rank in range(ranks))


def gather_in_order(x: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """[S/C, ...] of each rank, chunks in zigzag order -> [S, ...] in the order of the sequence, on every rank.

    The gradient of what is gathered is summed over the ranks and scattered back.
    """
    gathered = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
    chunks = gathered.chunk(2 * group.size())  # rank r's are number 2r (chunk r) and 2r+1 (chunk 2C-1-r)
    return torch.cat((*chunks[0::2], *reversed(chunks[1::2])))


@lru_cache(maxsize=16)
def _mask(num_queries: int, num_keys: int, start: int, window: int, device: torch.device) -> torch.Tensor:
    """[num_queries, num_keys], True where query start+i may see key j: 0 <= start+i-j, <= window unless that is < 0."""
    distance = torch.arange(start, start + num_queries, device=device)[:, None] - torch.arange(num_keys, device=device)
    seen = distance >= 0
    return seen if window < 0 else seen & (distance <= window)


def forget_masks() -> None:
    """Free the masks that were kept for the next call."""
    _mask.cache_clear()
