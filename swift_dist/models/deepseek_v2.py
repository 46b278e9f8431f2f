"""DeepSeek-V2: latent attention with a softmax mixture of experts; V2-Lite has no latent for its queries.

Converted, not trained. One thing megatron-core would compute otherwise: of a group of experts transformers takes the
best one's score (``group_limited_greedy``), megatron's ``group_limited_topk`` the sum of the best k / topk_group.
"""

from __future__ import annotations

from typing import Any

from swift_dist.converters.mapping import Rows
from swift_dist.models import _deepseek as deepseek
from swift_dist.models.base import Config, Family
from swift_dist.parallel import ModelShape

DEFAULTS = {
    **deepseek.COMMON_DEFAULTS,
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "first_k_dense_replace": 0,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": None,  # transformers assumes none and cannot run without
    "moe_intermediate_size": 1407,
    "routed_scaling_factor": 1.0,
    "n_group": None,
    "topk_group": None,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "scoring_func": "softmax",
}


def shape(config: Config) -> ModelShape:
    _check(config)
    return deepseek.shape(config, router_bias=False)


def transformer_config(config: Config) -> dict[str, Any]:
    """Softmax over all experts first, then the k largest as they are (times ``routed_scaling_factor``)."""
    _check(config)
    arguments = deepseek.transformer_config(config)
    if config["topk_method"] == "greedy":
        arguments.pop("moe_router_num_groups", None)
        arguments.pop("moe_router_group_topk", None)
    return {**arguments, "moe_router_score_function": "softmax", "moe_router_pre_softmax": True}


def rows(config: Config) -> Rows:
    _check(config)
    return deepseek.rows(config, router_bias=False)


def _check(config: Config) -> None:
    deepseek.check(config, "softmax")
    for key, known in (
        ("mlp_bias", (False,)),
        ("norm_topk_prob", (False,)),  # transformers 5 does not read it
        ("topk_method", ("greedy", "group_limited_greedy")),
    ):
        deepseek.require_one_of(config, key, known)


FAMILY = Family(
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    defaults=DEFAULTS,
    make_shape=shape,
    make_transformer_config=transformer_config,
    make_rows=rows,
    trainable=False,
)
