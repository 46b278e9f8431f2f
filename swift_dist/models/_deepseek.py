"""What DeepSeek-V2 and V3 share: latent attention (MLA), shared experts, dense layers first. Converted, not trained.

Rotary position. A head's RoPE part is stored in interleaved pairs (x0, x1), (x2, x3), ...; both sides take them apart
themselves. transformers: ``apply_rotary_pos_emb_interleave`` in models/deepseek_v3/modeling_deepseek_v3.py and
``apply_rotary_emb`` (complex numbers) in models/deepseek_v2/modeling_deepseek_v2.py. megatron-core:
``_apply_rotary_pos_emb_bshd`` in models/common/embeddings/rope_utils.py, which with ``multi_latent_attention`` splits
even and odd columns before it rotates halves, ``rotary_interleaved`` being off. So weights are copied as they are.

Heads. Both split a head's query into (nope, rope), its part of kv_b into (nope key, value) and kv_a into (latent, rope
key): ``MLASelfAttention.get_query_key_value_tensors`` in transformer/multi_latent_attention.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from swift_dist.converters.mapping import Direct, GatedMLP, Row, Rows
from swift_dist.errors import JobError
from swift_dist.models import _decoder as decoder
from swift_dist.models._rope import rope_parameters
from swift_dist.models.base import Config
from swift_dist.parallel import LatentAttention, ModelShape

COMMON_DEFAULTS: dict[str, Any] = {
    **decoder.COMMON_DEFAULTS,
    "attention_bias": False,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "qk_head_dim": None,
    "v_head_dim": 128,
    "output_router_logits": False,
    # In the published files; transformers 5 does not read them any more.
    "ep_size": 1,
    "moe_layer_freq": 1,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
}


def check(config: Config, scoring: str) -> None:
    """Refuse what would need other weights or another order of them."""
    layers, dense = config["num_hidden_layers"], config["first_k_dense_replace"]
    experts, top_k = config["n_routed_experts"], config["num_experts_per_tok"]
    query, head = config["q_lora_rank"], config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    for wrong, key, message in (
        (config["attention_bias"], "attention_bias", "true is not supported by megatron-core's latent attention"),
        (query is not None and not _is_count(query, 1), "q_lora_rank", f"must be null or positive, got {query!r}"),
        (
            not _is_count(dense, 0) or dense >= layers,
            "first_k_dense_replace",
            f"{dense!r} leaves no layer with experts",
        ),
        (top_k > experts, "num_experts_per_tok", f"{top_k} is more than n_routed_experts {experts}"),
        (
            config["qk_head_dim"] not in (None, head),
            "qk_head_dim",
            f"is not qk_nope_head_dim + qk_rope_head_dim {head}",
        ),
        (config["moe_layer_freq"] != 1, "moe_layer_freq", "only 1 is supported: experts in all layers but the first"),
        (config["scoring_func"] != scoring, "scoring_func", f"only {scoring!r} is supported for this family"),
    ):
        if wrong:
            raise JobError(f"model.config.{key}", message, "correct it in the model's configuration")


def require_one_of(config: Config, key: str, known: tuple[Any, ...]) -> None:
    """Refuse another value of a key, however rare: the rows or the numbers would be wrong without a word."""
    if config[key] not in known:
        values = " or ".join(map(repr, known))
        raise JobError(f"model.config.{key}", f"{config[key]!r} is not supported, only {values}", "use such a model")


def _is_count(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def moe_layers(config: Config) -> tuple[int, ...]:
    return tuple(range(config["first_k_dense_replace"], config["num_hidden_layers"]))


def shared_width(config: Config) -> int:
    """Inner width of all shared experts of a layer: they are stored as one MLP."""
    return int(config["n_shared_experts"] * config["moe_intermediate_size"])


def shape(config: Config, *, router_bias: bool) -> ModelShape:
    """The geometry, without multi-token-prediction layers: published counts leave them out."""
    nope, turned = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    latent = LatentAttention(
        q_lora_rank=config["q_lora_rank"],
        kv_lora_rank=config["kv_lora_rank"],
        qk_nope_head_dim=nope,
        qk_rope_head_dim=turned,
        v_head_dim=config["v_head_dim"],
    )
    plain = decoder.shape(_mixture(config), decoder.Variant(moe_layers=moe_layers(config)))
    return replace(
        plain,
        head_dim=nope + turned,
        shared_expert_ffn_hidden_size=shared_width(config),
        router_bias=router_bias,
        latent_attention=latent,
    )


def _mixture(config: Config) -> Config:
    """With the name that `_decoder` has for the number of experts."""
    return {**config, "num_experts": config["n_routed_experts"]}


def transformer_config(config: Config) -> dict[str, Any]:
    """MLATransformerConfig arguments without the router's choice of experts, which V2 and V3 make differently."""
    dense, layers = config["first_k_dense_replace"], config["num_hidden_layers"]
    arguments = decoder.transformer_config(config, decoder.Variant(moe_layers=moe_layers(config)))
    grouped = {}
    if (config["n_group"] or 1) > 1:
        grouped = {"moe_router_num_groups": config["n_group"], "moe_router_group_topk": config["topk_group"]}
    return {
        **arguments,
        "num_query_groups": config["num_attention_heads"],
        "multi_latent_attention": True,
        "qk_layernorm": True,  # of the latents; megatron folds it into the projections up from them
        "q_lora_rank": config["q_lora_rank"],
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_head_dim": config["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
        **_rope_arguments(config),
        "num_moe_experts": config["n_routed_experts"],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_shared_expert_intermediate_size": shared_width(config),
        "moe_layer_freq": [int(layer >= dense) for layer in range(layers)],
        "moe_router_dtype": "fp32",
        "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        **grouped,
    }


def _rope_arguments(config: Config) -> dict[str, Any]:
    """megatron's latent attention makes its own frequencies and softmax scale, from these.

    transformers multiplies cosine and sine by m(mscale) / m(mscale_all_dim) if both are stated, else by m(1), with
    m(x) = 0.1 x ln(factor) + 1, and the softmax scale by m(mscale_all_dim)^2 if that is stated.
    """
    parameters = rope_parameters(config)
    found = {"rotary_base": parameters["rope_theta"], "rotary_percent": 1.0}
    if parameters["rope_type"] == "default":
        return {**found, "rope_type": "rope", "rotary_scaling_factor": 1.0}
    weight, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    stated = parameters.keys() & {"attention_factor", "truncate"}
    if parameters["rope_type"] != "yarn" or stated or (all_dim and not weight):
        raise JobError(
            "model.config.rope_parameters",
            f"{parameters} is not what megatron-core's latent attention computes",
            "it knows the types default and yarn, the latter with mscale and mscale_all_dim",
        )
    return {
        **found,
        "rope_type": "yarn",
        "rotary_scaling_factor": parameters["factor"],
        "original_max_position_embeddings": parameters["original_max_position_embeddings"],
        "beta_fast": parameters.get("beta_fast") or 32,
        "beta_slow": parameters.get("beta_slow") or 1,
        "mscale": weight if weight and all_dim else 1.0,
        "mscale_all_dim": all_dim or 0.0,
    }


def rows(config: Config, *, router_bias: bool) -> Rows:
    """Rows of the whole model but for multi-token prediction."""
    dense = tuple(range(config["first_k_dense_replace"]))
    embedding, output = decoder.outer_rows(config)
    return (
        *embedding,
        *attention_rows(config, decoder.Layers.decoder(tuple(range(config["num_hidden_layers"])))),
        *(decoder.mlp_rows(config, decoder.Layers.decoder(dense)) if dense else ()),
        *mixture_rows(config, decoder.Layers.decoder(moe_layers(config)), router_bias=router_bias),
        *output,
    )


def attention_rows(config: Config, where: decoder.Layers) -> list[Row]:
    """Latent attention and the norm before it, which reads by two projections and so is folded into neither.

    The projections down to the latents are whole on every tensor-parallel rank: ``TELinear`` with ``parallel_mode``
    "duplicated" (``MLASelfAttention.__init__``). Those up from them split by heads, their norms do not.
    """
    megatron, hf, layers = f"{where.megatron}self_attention.", f"{where.hf}self_attn.", where.numbers
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, turned, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    query = config["q_lora_rank"]

    def direct(ours: str, theirs: str, shape: tuple[int, ...], axis: int | None = None) -> Row:
        return Direct(f"{megatron}{ours}", f"{hf}{theirs}", shape, split_axis=axis, layers=layers)

    norm = f"{where.hf}input_layernorm.weight"
    found: list[Row] = [Direct(f"{where.megatron}input_layernorm.weight", norm, (hidden,), layers=layers)]
    if query is None:
        found.append(direct("linear_q_proj.weight", "q_proj.weight", (heads * (nope + turned), hidden), 0))
    else:
        found += [
            direct("linear_q_down_proj.weight", "q_a_proj.weight", (query, hidden)),
            direct("linear_q_up_proj.layer_norm_weight", "q_a_layernorm.weight", (query,)),
            direct("linear_q_up_proj.weight", "q_b_proj.weight", (heads * (nope + turned), query), 0),
        ]
    return [
        *found,
        direct("linear_kv_down_proj.weight", "kv_a_proj_with_mqa.weight", (latent + turned, hidden)),
        direct("linear_kv_up_proj.layer_norm_weight", "kv_a_layernorm.weight", (latent,)),
        direct("linear_kv_up_proj.weight", "kv_b_proj.weight", (heads * (nope + value), latent), 0),
        direct("linear_proj.weight", "o_proj.weight", (hidden, heads * value), 1),
    ]


def mixture_rows(config: Config, where: decoder.Layers, *, router_bias: bool) -> list[Row]:
    """Router, routed experts, shared experts and the norm before them."""
    layers, hidden, inner = where.numbers, config["hidden_size"], shared_width(config)
    ours, theirs = f"{where.megatron}mlp.shared_experts.", f"{where.hf}mlp.shared_experts."
    gate_up = (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight")
    found = [
        *decoder.expert_rows(_mixture(config), where, decoder.ExpertNames()),
        GatedMLP(f"{ours}linear_fc1.weight", gate_up, inner, hidden, layers),
        Direct(f"{ours}linear_fc2.weight", f"{theirs}down_proj.weight", (hidden, inner), split_axis=1, layers=layers),
    ]
    if router_bias:
        bias = (f"{where.megatron}mlp.router.expert_bias", f"{where.hf}mlp.gate.e_score_correction_bias")
        found.append(Direct(*bias, (config["n_routed_experts"],), layers=layers, keep_dtype=True))
    return found
