"""Qwen2 and Qwen2.5: biases on query, key and value; optionally a sliding window in the upper layers."""

from __future__ import annotations

from swift_dist.models import _decoder as decoder
from swift_dist.models.base import Config, Family

DEFAULTS = {
    **decoder.COMMON_DEFAULTS,
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}


def variant(config: Config) -> decoder.Variant:
    window, layers = decoder.qwen_window(config)
    return decoder.Variant(qkv_bias=True, window=window, window_layers=layers)


FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    defaults=DEFAULTS,
    make_shape=lambda config: decoder.shape(config, variant(config)),
    make_transformer_config=lambda config: decoder.transformer_config(config, variant(config)),
    make_rows=lambda config: decoder.rows(config, variant(config)),
)
