"""What the decoder-only families share: pre-norm RMSNorm layers, grouped-query attention, gated MLP or experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from swift_dist.converters.mapping import QKV, Direct, Duplicate, Embedding, Experts, GatedMLP, Row, Rows
from swift_dist.errors import JobError
from swift_dist.models.base import Config, activation_function
from swift_dist.parallel import ModelShape

COMMON_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}


@dataclass(frozen=True)
class Layers:
    """Where layers of one kind are: what their tensors' names begin with on either side, and which layers they are.

    Args:
        megatron, hf: beginnings of names; may hold ``{layer}``.
        numbers: the layers; empty: one layer that is not numbered within the decoder.
    """

    megatron: str
    hf: str
    numbers: tuple[int, ...] = ()

    @classmethod
    def decoder(cls, numbers: tuple[int, ...]) -> Layers:
        return cls("decoder.layers.{layer}.", "model.layers.{layer}.", numbers)


@dataclass(frozen=True)
class ExpertNames:
    """What a family's folders call the parts of a mixture, within a layer."""

    router: str = "mlp.gate.weight"
    gate: str = "mlp.experts.{expert}.gate_proj.weight"
    up: str = "mlp.experts.{expert}.up_proj.weight"
    down: str = "mlp.experts.{expert}.down_proj.weight"


@dataclass(frozen=True)
class Variant:
    """In what a decoder differs from the plain one.

    Args:
        qkv_bias: biases on the query, key and value projections only (Qwen2).
        all_bias: biases on every projection of attention and MLP (Llama's attention_bias with mlp_bias).
        qk_norm: RMSNorm over each head's query and key (Qwen3).
        window: keys that a token attends to at most, itself included; None: all before it.
        window_layers: the layers to which `window` applies; None: all.
        moe_layers: the layers whose MLP is a mixture of experts.
        expert_names: what the experts are called in a folder.
    """

    qkv_bias: bool = False
    all_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    window_layers: tuple[int, ...] | None = None
    moe_layers: tuple[int, ...] = ()
    expert_names: ExpertNames = ExpertNames()


def shape(config: Config, variant: Variant) -> ModelShape:
    """The geometry. A window that only some layers have is left out, so FLOPs are then counted a little high."""
    moe: dict[str, Any] = {}
    if variant.moe_layers:
        moe = {
            "num_experts": config["num_experts"],
            "moe_top_k": config["num_experts_per_tok"],
            "moe_ffn_hidden_size": config["moe_intermediate_size"],
            "num_dense_layers": config["num_hidden_layers"] - len(variant.moe_layers),
        }
    return ModelShape(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        ffn_hidden_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        tie_embeddings=config["tie_word_embeddings"],
        gated_mlp=True,
        qkv_bias=variant.qkv_bias or variant.all_bias,
        attention_output_bias=variant.all_bias,
        mlp_bias=variant.all_bias,
        qk_norm=variant.qk_norm,
        sliding_window=variant.window if variant.window_layers is None else None,
        max_position_embeddings=config["max_position_embeddings"],
        **moe,
    )


def transformer_config(config: Config, variant: Variant) -> dict[str, Any]:
    """TransformerConfig arguments (megatron/core/transformer/transformer_config.py).

    A window of W tokens is ``window_size=(W - 1, 0)``: megatron and TE count the keys to the left of the query, without
    the query itself; transformers keeps key > query - W. ``window_attn_skip_freq`` lists 1 for each layer that has the
    window and 0 for one that attends to everything.
    """
    arguments = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config["head_dim"],
        "ffn_hidden_size": config["intermediate_size"],
        "normalization": "RMSNorm",
        "layernorm_epsilon": config["rms_norm_eps"],
        "gated_linear_unit": True,
        "activation_func": activation_function(config["hidden_act"]),
        "add_bias_linear": variant.all_bias,
        "add_qkv_bias": variant.qkv_bias,
        "qk_layernorm": variant.qk_norm,
        "attention_dropout": config["attention_dropout"],
        "hidden_dropout": 0.0,
        "init_method_std": config["initializer_range"],
    }
    if variant.window is not None:
        arguments["window_size"] = (variant.window - 1, 0)
        if variant.window_layers is not None:
            layers = range(config["num_hidden_layers"])
            arguments["window_attn_skip_freq"] = [int(layer in variant.window_layers) for layer in layers]
    return arguments


def rows(config: Config, variant: Variant) -> Rows:
    """Rows of the whole model. Megatron's names are those of Transformer Engine's layers: a norm before a projection
    is that projection's ``layer_norm_weight``."""
    every = tuple(range(config["num_hidden_layers"]))
    dense = tuple(layer for layer in every if layer not in variant.moe_layers)
    mixtures = Layers.decoder(variant.moe_layers)
    embedding, output = outer_rows(config)
    return (
        *embedding,
        *_attention_rows(config, variant, every),
        *(mlp_rows(config, Layers.decoder(dense), variant.all_bias) if dense else ()),
        *(expert_rows(config, mixtures, variant.expert_names) if variant.moe_layers else ()),
        *output,
    )


def outer_rows(config: Config) -> tuple[Rows, Rows]:
    """What is before the layers, and what is after them."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    output: Rows = (Embedding("output_layer.weight", head, vocab, hidden),)
    if config["tie_word_embeddings"]:
        copy = Embedding("output_layer.weight", embedding, vocab, hidden, tied_copy=True)
        output = (copy, Duplicate(head, embedding, required=False))  # some folders hold both
    return (
        (Embedding("embedding.word_embeddings.weight", embedding, vocab, hidden),),
        (Direct("decoder.final_layernorm.weight", "model.norm.weight", (hidden,)), *output),
    )


def _attention_rows(config: Config, variant: Variant, layers: tuple[int, ...]) -> list[Row]:
    megatron, hf = "decoder.layers.{layer}.self_attention.", "model.layers.{layer}.self_attn."
    hidden, heads, head_dim = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    groups = config["num_key_value_heads"]
    norm = "model.layers.{layer}.input_layernorm.weight"
    weights = (f"{hf}q_proj.weight", f"{hf}k_proj.weight", f"{hf}v_proj.weight")
    out = (hidden, heads * head_dim)
    found: list[Row] = [
        Direct(f"{megatron}linear_qkv.layer_norm_weight", norm, (hidden,), layers=layers),
        QKV(f"{megatron}linear_qkv.weight", weights, heads, groups, head_dim, hidden, layers),
        Direct(f"{megatron}linear_proj.weight", f"{hf}o_proj.weight", out, split_axis=1, layers=layers),
    ]
    if variant.qkv_bias or variant.all_bias:
        biases = (f"{hf}q_proj.bias", f"{hf}k_proj.bias", f"{hf}v_proj.bias")
        found.append(QKV(f"{megatron}linear_qkv.bias", biases, heads, groups, head_dim, None, layers))
    if variant.all_bias:
        found.append(Direct(f"{megatron}linear_proj.bias", f"{hf}o_proj.bias", (hidden,), layers=layers))
    if variant.qk_norm:
        for side in "qk":
            name = f"{megatron}{side}_layernorm.weight"
            found.append(Direct(name, f"{hf}{side}_norm.weight", (head_dim,), layers=layers))
    return found


def mlp_rows(config: Config, where: Layers, biased: bool = False) -> list[Row]:
    """A dense MLP and the norm before it."""
    megatron, hf, layers = f"{where.megatron}mlp.", f"{where.hf}mlp.", where.numbers
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    norm = f"{where.hf}post_attention_layernorm.weight"
    gate_up = (f"{hf}gate_proj.weight", f"{hf}up_proj.weight")
    found: list[Row] = [
        Direct(f"{megatron}linear_fc1.layer_norm_weight", norm, (hidden,), layers=layers),
        GatedMLP(f"{megatron}linear_fc1.weight", gate_up, inner, hidden, layers),
        Direct(f"{megatron}linear_fc2.weight", f"{hf}down_proj.weight", (hidden, inner), split_axis=1, layers=layers),
    ]
    if biased:
        biases = (f"{hf}gate_proj.bias", f"{hf}up_proj.bias")
        found.append(GatedMLP(f"{megatron}linear_fc1.bias", biases, inner, None, layers))
        found.append(Direct(f"{megatron}linear_fc2.bias", f"{hf}down_proj.bias", (hidden,), layers=layers))
    return found


def expert_rows(config: Config, where: Layers, names: ExpertNames) -> list[Row]:
    """A router, its experts, and the norm before them."""
    megatron, hf, layers = where.megatron, where.hf, where.numbers
    hidden, inner, num_experts = config["hidden_size"], config["moe_intermediate_size"], config["num_experts"]
    norm, expert = f"{hf}post_attention_layernorm.weight", f"{megatron}mlp.experts.local_experts.{{expert}}."
    gate_up, router = (f"{hf}{names.gate}", f"{hf}{names.up}"), f"{hf}{names.router}"
    fc1 = GatedMLP(f"{expert}linear_fc1.weight", gate_up, inner, hidden, layers)
    fc2 = Direct(f"{expert}linear_fc2.weight", f"{hf}{names.down}", (hidden, inner), split_axis=1, layers=layers)
    return [
        Direct(f"{megatron}pre_mlp_layernorm.weight", norm, (hidden,), layers=layers),
        Direct(f"{megatron}mlp.router.weight", router, (num_experts, hidden), layers=layers),
        Experts(fc1, num_experts),
        Experts(fc2, num_experts),
    ]


def moe_arguments(config: Config, moe_layers: tuple[int, ...]) -> dict[str, Any]:
    """TransformerConfig arguments of a softmax top-k mixture whose routing equals transformers'.

    transformers: softmax over all experts, take the k largest, divide by their sum if ``norm_topk_prob``. Normalised
    probabilities equal a softmax over the k logits, megatron's default; unnormalised ones are its pre-softmax. The
    router computes in the model's precision on both sides.

    Auxiliary loss. With n_il tokens of T sent to expert i in layer l, and P_il the mean probability, E experts, L MoE
    layers, k experts a token:

        transformers:  coef * E * sum_i (mean_l n_il / T) * (mean_l P_il)         over all layers pooled
        megatron:      c * E * sum_l sum_i (n_il / (k T)) * P_il                  layer by layer

    c = coef * k / L makes them equal for one MoE layer. For more, megatron's asks every layer for balance and
    transformers' only their average (it lacks the spread between layers). transformers adds the loss only if
    ``output_router_logits`` is set. A z-loss (``router_z_loss_coef``) is applied where the config states one.
    """
    coefficient = 0.0
    if config["output_router_logits"]:
        coefficient = config["router_aux_loss_coef"] * config["num_experts_per_tok"] / len(moe_layers)
    every = len(moe_layers) == config["num_hidden_layers"]
    return {
        "num_moe_experts": config["num_experts"],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_layer_freq": 1 if every else [int(layer in moe_layers) for layer in range(config["num_hidden_layers"])],
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not config["norm_topk_prob"],
        "moe_router_load_balancing_type": "aux_loss" if coefficient else "none",
        "moe_aux_loss_coeff": coefficient,
        "moe_z_loss_coeff": config["router_z_loss_coef"] or None,
    }


def qwen_window(config: Config) -> tuple[int | None, tuple[int, ...] | None]:
    """Window and the layers that have it, from Qwen2's and Qwen3's three settings; see `Variant`.

    ``layer_types`` decides if stated; otherwise layers from ``max_window_layers`` on have the window if
    ``use_sliding_window``.
    """
    window = config["sliding_window"] if config["use_sliding_window"] else None
    layers, kinds = range(config["num_hidden_layers"]), config["layer_types"]
    if kinds is None:
        sliding = tuple(layer for layer in layers if window is not None and layer >= config["max_window_layers"])
    else:
        if len(kinds) != len(layers) or set(kinds) - {"full_attention", "sliding_attention"}:
            raise JobError(
                "model.config.layer_types",
                f"must name full_attention or sliding_attention for each of {len(layers)} layers, got {kinds}",
                "other kinds of attention are not supported",
            )
        sliding = tuple(layer for layer in layers if kinds[layer] == "sliding_attention")
        if sliding and window is None:
            raise JobError(
                "model.config.layer_types",
                "names sliding_attention but use_sliding_window is off or sliding_window is null",
                "set use_sliding_window and sliding_window, or name full_attention",
            )
    if not sliding:
        return None, None
    check_window(window)
    return window, None if len(sliding) == len(layers) else sliding


def check_window(window: Any) -> None:
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise JobError(
            "model.config.sliding_window",
            f"must be a positive whole number, got {window!r}",
            "correct it in the model's configuration",
        )
