"""DeepSeek-V3 (and R1): latent attention, a sigmoid mixture of experts with a correction bias, multi-token prediction.

Converted, not trained. The published files are in FP8 with a scale for each block of a weight (``weight_scale_inv``);
they are read as the bf16 values that they stand for.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from swift_dist.converters.mapping import Direct, Duplicate, Rows
from swift_dist.errors import JobError
from swift_dist.models import _decoder as decoder
from swift_dist.models import _deepseek as deepseek
from swift_dist.models.base import Config, Family
from swift_dist.parallel import ModelShape

MTP = "num_nextn_predict_layers"
DEFAULTS = {
    **deepseek.COMMON_DEFAULTS,
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "max_position_embeddings": 4096,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "rope_interleave": True,
    MTP: 0,  # transformers assumes 1, though the folders that it saves never hold that layer
}


def shape(config: Config) -> ModelShape:
    _check(config)
    return deepseek.shape(config, router_bias=True)


def transformer_config(config: Config) -> dict[str, Any]:
    """Sigmoid scores; the bias takes part in the choice of experts only. megatron moves the bias by itself, at its own
    default rate: the configuration states none. Of a group of experts transformers adds up the best two scores and
    megatron the best k / topk_group, which are two in the published configuration."""
    _check(config)
    return {
        **deepseek.transformer_config(config),
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "mtp_num_layers": config[MTP] or None,
    }


def rows(config: Config) -> Rows:
    _check(config)
    found = deepseek.rows(config, router_bias=True)
    for index in range(config[MTP]):
        found = (*found, *_prediction_rows(config, index))
    return found


def _prediction_rows(config: Config, index: int) -> Rows:
    """One multi-token-prediction layer. In a folder it is a layer after the last one, which repeats the embedding and
    the output layer; in Megatron it is ``mtp.layers.<index>``, which shares them.

    ``eh_proj`` reads (embedding, hidden state) in that order on both sides, so its columns are copied as they are:
    ``MtpLayer.forward`` in transformers' modeling_layers.py, ``MultiTokenPredictionLayer._concat_embeddings`` in
    megatron/core/transformer/multi_token_prediction.py.
    """
    hidden, hf = config["hidden_size"], f"model.layers.{config['num_hidden_layers'] + index}."
    megatron = f"mtp.layers.{index}."
    inside = decoder.Layers(f"{megatron}transformer_layer.", hf)
    embedding = "model.embed_tokens.weight"
    head = embedding if config["tie_word_embeddings"] else "lm_head.weight"
    return (
        Direct(f"{megatron}enorm.weight", f"{hf}enorm.weight", (hidden,)),
        Direct(f"{megatron}hnorm.weight", f"{hf}hnorm.weight", (hidden,)),
        Direct(f"{megatron}eh_proj.weight", f"{hf}eh_proj.weight", (hidden, 2 * hidden), split_axis=0),
        *deepseek.attention_rows(config, inside),
        *deepseek.mixture_rows(config, inside, router_bias=True),
        Direct(f"{megatron}final_layernorm.weight", f"{hf}shared_head.norm.weight", (hidden,)),
        Duplicate(f"{hf}embed_tokens.weight", embedding),
        Duplicate(f"{hf}shared_head.head.weight", head),
    )


def _check(config: Config) -> None:
    deepseek.check(config, "sigmoid")
    deepseek.require_one_of(config, "topk_method", ("noaux_tc",))
    deepseek.require_one_of(config, "norm_topk_prob", (True,))
    deepseek.require_one_of(config, "rope_interleave", (True,))
    count = config[MTP]
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise JobError(f"model.config.{MTP}", f"must be a whole number, got {count!r}", "0 for none")


def fit_folder(hf: Config, names: Collection[str]) -> Config:
    """Without multi-token prediction where there is no such layer: transformers' own class leaves it out when it saves,
    and its config.json keeps stating it."""
    after = f"model.layers.{hf.get('num_hidden_layers', DEFAULTS['num_hidden_layers'])}."
    if any(name.startswith((after, "mtp.layers.")) for name in names):
        return hf
    stated = {key: value for key, value in hf.items() if key != "num_mtp_layers"}
    return {**stated, MTP: 0}


FAMILY = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    defaults=DEFAULTS,
    make_shape=shape,
    make_transformer_config=transformer_config,
    make_rows=rows,
    trainable=False,
    fit_folder=fit_folder,
)
