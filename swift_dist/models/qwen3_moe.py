"""Qwen3-MoE: Qwen3's attention with a softmax top-k mixture of experts in all or some layers."""

from __future__ import annotations

from typing import Any

from swift_dist.errors import JobError
from swift_dist.models import _decoder as decoder
from swift_dist.models.base import Config, Family

DEFAULTS = {
    **decoder.COMMON_DEFAULTS,
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": False,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "router_z_loss_coef": None,
    "mlp_only_layers": None,
}


def variant(config: Config) -> decoder.Variant:
    """Layer l is a mixture unless it is in mlp_only_layers or (l + 1) is no multiple of decoder_sparse_step. The
    window, where use_sliding_window is on, is in every layer: transformers 5 reads no max_window_layers here."""
    dense, step = set(config["mlp_only_layers"] or ()), config["decoder_sparse_step"]
    moe_layers = tuple(
        layer for layer in range(config["num_hidden_layers"]) if layer not in dense and (layer + 1) % step == 0
    )
    _check(config, moe_layers)
    window = config["sliding_window"] if config["use_sliding_window"] else None
    if window is not None:
        decoder.check_window(window)
    return decoder.Variant(qk_norm=True, window=window, moe_layers=moe_layers)


def _check(config: Config, moe_layers: tuple[int, ...]) -> None:
    experts, top_k = config["num_experts"], config["num_experts_per_tok"]
    for wrong, key, message, remedy in (
        (config["attention_bias"], "attention_bias", "true is not supported by megatron-core here", "set it to false"),
        (not moe_layers, "mlp_only_layers", "leaves no layer with experts", "use the qwen3 family for a dense model"),
        (top_k > experts, "num_experts_per_tok", f"{top_k} is more than num_experts {experts}", "lower it"),
        (
            top_k == 1 and config["norm_topk_prob"],
            "norm_topk_prob",
            "true with one expert a token gives every token the weight 1 and the router no gradient",
            "set norm_topk_prob to false or num_experts_per_tok above 1",
        ),
    ):
        if wrong:
            raise JobError(f"model.config.{key}", message, remedy)


def transformer_config(config: Config) -> dict[str, Any]:
    found = variant(config)
    return decoder.transformer_config(config, found) | decoder.moe_arguments(config, found.moe_layers)


FAMILY = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    defaults=DEFAULTS,
    make_shape=lambda config: decoder.shape(config, variant(config)),
    make_transformer_config=transformer_config,
    make_rows=lambda config: decoder.rows(config, variant(config)),
)
