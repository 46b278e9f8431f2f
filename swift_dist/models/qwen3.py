"""Qwen3, dense: RMSNorm over each head's query and key; head_dim is stated apart from the hidden size."""

from __future__ import annotations

from swift_dist.errors import JobError
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
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}


def variant(config: Config) -> decoder.Variant:
    if config["attention_bias"]:
        raise JobError(
            "model.config.attention_bias",
            "true: megatron-core has no biases on the attention projections without biases in the MLP",
            "set attention_bias to false (every released Qwen3 has it so)",
        )
    window, layers = decoder.qwen_window(config)
    return decoder.Variant(qk_norm=True, window=window, window_layers=layers)


FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    defaults=DEFAULTS,
    make_shape=lambda config: decoder.shape(config, variant(config)),
    make_transformer_config=lambda config: decoder.transformer_config(config, variant(config)),
    make_rows=lambda config: decoder.rows(config, variant(config)),
)
