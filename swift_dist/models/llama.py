"""Llama 2 and 3 (and everything that states LlamaForCausalLM)."""

from __future__ import annotations

from swift_dist.errors import JobError
from swift_dist.models import _decoder as decoder
from swift_dist.models.base import Config, Family

DEFAULTS = {
    **decoder.COMMON_DEFAULTS,
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
}


def variant(config: Config) -> decoder.Variant:
    """Megatron has biases everywhere or (Qwen2) on query, key and value; Llama's attention_bias adds the output's."""
    if config["attention_bias"] != config["mlp_bias"]:
        raise JobError(
            "model.config.attention_bias",
            f"{config['attention_bias']} with mlp_bias {config['mlp_bias']}: megatron-core has biases on all "
            "projections or on none",
            "set attention_bias and mlp_bias alike",
        )
    return decoder.Variant(all_bias=config["attention_bias"])


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    defaults=DEFAULTS,
    make_shape=lambda config: decoder.shape(config, variant(config)),
    make_transformer_config=lambda config: decoder.transformer_config(config, variant(config)),
    make_rows=lambda config: decoder.rows(config, variant(config)),
)
