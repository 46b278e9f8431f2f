"""Geometry of the families that recipes state and the engine cannot train yet.

Enough to check a layout and count parameters before the family's own file exists in `swift_dist/models/`; that file
then replaces the function here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from swift_dist.errors import JobError
from swift_dist.parallel import LatentAttention, ModelShape


def shape_of_unsupported(hf: Mapping[str, Any]) -> ModelShape:
    """The geometry that a config.json of one of these families states.

    Raises:
        JobError: the family is none of them.
    """
    model_type = hf.get("model_type")
    if model_type not in _SHAPES:
        raise JobError(
            "model.config.model_type",
            f"{model_type!r} has no known geometry; known: {', '.join(sorted(_SHAPES))}",
            "add its geometry to swift_dist/recipes/geometry.py",
        )
    return _SHAPES[model_type](hf)


def _mixtral(hf: Mapping[str, Any]) -> ModelShape:
    heads = hf["num_attention_heads"]
    return ModelShape(
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        num_attention_heads=heads,
        num_query_groups=hf["num_key_value_heads"],
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        ffn_hidden_size=hf["intermediate_size"],
        vocab_size=hf["vocab_size"],
        tie_embeddings=hf["tie_word_embeddings"],
        num_experts=hf["num_local_experts"],
        moe_top_k=hf["num_experts_per_tok"],
        moe_ffn_hidden_size=hf["intermediate_size"],
        sliding_window=hf["sliding_window"],
        max_position_embeddings=hf["max_position_embeddings"],
    )


def _deepseek_v3(hf: Mapping[str, Any]) -> ModelShape:
    """Without the multi-token-prediction layers (num_nextn_predict_layers), as published counts leave them out."""
    return ModelShape(
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        num_attention_heads=hf["num_attention_heads"],
        num_query_groups=hf["num_key_value_heads"],
        head_dim=hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"],
        ffn_hidden_size=hf["intermediate_size"],
        vocab_size=hf["vocab_size"],
        tie_embeddings=hf["tie_word_embeddings"],
        num_experts=hf["n_routed_experts"],
        moe_top_k=hf["num_experts_per_tok"],
        moe_ffn_hidden_size=hf["moe_intermediate_size"],
        shared_expert_ffn_hidden_size=hf["n_shared_experts"] * hf["moe_intermediate_size"],
        num_dense_layers=hf["first_k_dense_replace"],
        router_bias=hf["topk_method"] == "noaux_tc",
        max_position_embeddings=hf["max_position_embeddings"],
        latent_attention=LatentAttention(
            q_lora_rank=hf["q_lora_rank"],
            kv_lora_rank=hf["kv_lora_rank"],
            qk_nope_head_dim=hf["qk_nope_head_dim"],
            qk_rope_head_dim=hf["qk_rope_head_dim"],
            v_head_dim=hf["v_head_dim"],
        ),
    )


_SHAPES: dict[str, Callable[[Mapping[str, Any]], ModelShape]] = {"mixtral": _mixtral, "deepseek_v3": _deepseek_v3}
