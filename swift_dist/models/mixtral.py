"""Mixtral: Llama's layers, each with a softmax top-k mixture of experts instead of the MLP. Converted, not trained."""

from __future__ import annotations

from typing import Any

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
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
# transformers 5 calls these otherwise in memory and translates when it loads and saves (conversion_mapping.py).
NAMES = decoder.ExpertNames(
    router="block_sparse_moe.gate.weight",
    gate="block_sparse_moe.experts.{expert}.w1.weight",
    up="block_sparse_moe.experts.{expert}.w3.weight",
    down="block_sparse_moe.experts.{expert}.w2.weight",
)


def mixture(config: Config) -> Config:
    """With the keys that `_decoder` reads of a mixture. The chosen experts' weights are always normalised
    (``MixtralTopKRouter`` in transformers' models/mixtral/modeling_mixtral.py)."""
    experts, top_k = config["num_experts"], config["num_experts_per_tok"]
    if top_k > experts:
        raise JobError(
            "model.config.num_experts_per_tok", f"{top_k} is more than num_local_experts {experts}", "lower it"
        )
    sizes = {"moe_intermediate_size": config["intermediate_size"]}
    return {**config, **sizes, "norm_topk_prob": True, "router_z_loss_coef": None}


def variant(config: Config) -> decoder.Variant:
    window = config["sliding_window"]
    if window is not None:
        decoder.check_window(window)
    every = tuple(range(config["num_hidden_layers"]))
    return decoder.Variant(window=window, moe_layers=every, expert_names=NAMES)


def transformer_config(config: Config) -> dict[str, Any]:
    config, found = mixture(config), variant(config)
    return decoder.transformer_config(config, found) | decoder.moe_arguments(config, found.moe_layers)


FAMILY = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    defaults=DEFAULTS,
    make_shape=lambda config: decoder.shape(mixture(config), variant(config)),
    make_transformer_config=transformer_config,
    make_rows=lambda config: decoder.rows(mixture(config), variant(config)),
    trainable=False,
)
