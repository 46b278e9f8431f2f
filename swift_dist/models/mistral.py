"""Mistral: Llama's layers with a sliding window in every layer (null: none; absent: 4096, as transformers has it)."""

from __future__ import annotations

from swift_dist.errors import JobError
from swift_dist.models import _decoder as decoder
from swift_dist.models.base import Config, Family

DEFAULTS = {
    **decoder.COMMON_DEFAULTS,
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "layer_types": None,
}


def variant(config: Config) -> decoder.Variant:
    window = config["sliding_window"]
    kind = "full_attention" if window is None else "sliding_attention"
    if config["layer_types"] is not None and set(config["layer_types"]) != {kind}:
        raise JobError(
            "model.config.layer_types",
            f"a Mistral model with sliding_window {window} has {kind} in every layer, got {config['layer_types']}",
            "transformers ignores layer_types for Mistral: remove it, or use the family that alternates",
        )
    if window is not None:
        decoder.check_window(window)
    return decoder.Variant(window=window)


FAMILY = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    defaults=DEFAULTS,
    make_shape=lambda config: decoder.shape(config, variant(config)),
    make_transformer_config=lambda config: decoder.transformer_config(config, variant(config)),
    make_rows=lambda config: decoder.rows(config, variant(config)),
)
