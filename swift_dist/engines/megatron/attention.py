"""Core attention on `torch.nn.functional.scaled_dot_product_attention`, for machines without transformer-engine.

Causal, grouped queries, sliding window, dropout, context parallelism. Context parallelism splits a sequence of S
tokens into 2C chunks of which rank r holds chunks r and 2C-1-r ("zigzag", as megatron's `get_batch_on_this_cp_rank`
does), so that all ranks have the same amount of causal work. Keys and values are gathered over the group; in the
backward pass their gradients are reduce-scattered. Every rank then computes exact attention for its two chunks.
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
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None
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
        assert attention_bias is None and packed_seq_params is None, "biases and packed sequences are not built here"
        if self.dropout == 0.0 or not self.training or self.config.sequence_parallel:
            # Under sequence parallelism the whole layer already runs in the tensor-parallel generator's context.
            return self._attend(query, key, value)
        with get_cuda_rng_tracker().fork():  # other heads, other dropout: the tensor-parallel ranks must differ
            return self._attend(query, key, value)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if self.cp_group is None:
            return self._attend_chunk(query, key, value, 0)
        size, rank = self.cp_group.size(), self.cp_group.rank()
        chunk = query.shape[0] // 2
        keys_values = gather_in_order(torch.cat((key, value), dim=-1), self.cp_group)
        key, value = keys_values.split((key.shape[-1], value.shape[-1]), dim=-1)
        outputs = []
        for queries, index in zip(query.split(chunk), (rank, 2 * size - 1 - rank), strict=True):
            end = (index + 1) * chunk  # later keys are in the future of the whole chunk
            outputs.append(self._attend_chunk(queries, key[:end], value[:end], index * chunk))
        return torch.cat(outputs)

    def _attend_chunk(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: int) -> torch.Tensor:
        """Attention of the queries at positions start, start+1, ... to the keys from position 0 on."""
        num_queries, num_keys = query.shape[0], key.shape[0]
        plain = start == 0 and (self.window < 0 or self.window >= num_keys - 1)
        mask = None if plain else _mask(num_queries, num_keys, start, self.window, query.device)
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
