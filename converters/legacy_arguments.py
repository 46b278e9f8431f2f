"""Megatron-LM's arguments, which its legacy checkpoints carry, and a Hugging Face config: each from the other.

Names: megatron/training/arguments.py. Where arguments do not decide what a config needs, that is said, not guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swift_dist.errors import JobError

_LLAMA3 = {  # built in: _apply_scaling in megatron/core/models/common/embeddings/rotary_pos_embedding.py
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_REMEDY = "give --hf_config FOLDER or config.json"
_NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "max_position_embeddings")
_FIXED: dict[str, tuple[Any, ...]] = {  # argument: values that the families here have; missing counts as None
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "rotary_percent": (None, 1.0),
    "moe_router_score_function": (None, "softmax"),
    "softmax_type": (None, "vanilla"),
}
_ABSENT = (  # what adds or changes weights or numbers in a way that no flag below states
    *("multi_latent_attention", "apply_layernorm_1p", "rotary_interleaved"),
    *("moe_shared_expert_intermediate_size", "mtp_num_layers", "heterogeneous_layers_config_path", "qk_l2_norm"),
    *("is_hybrid_model", "hybrid_layer_pattern", "experimental_attention_variant", "attention_output_gate"),
    *("squared_relu", "quick_geglu", "openai_gelu", "moe_router_topk_scaling_factor", "moe_router_num_groups"),
    *("moe_router_enable_expert_bias", "window_attn_skip_freq", "no_rope_freq"),
)
_RENAMED = {  # TransformerConfig's name: the argument's
    "layernorm_epsilon": "norm_epsilon",
    "num_moe_experts": "num_experts",
    "gated_linear_unit": "swiglu",
}


def config_of_arguments(args: Mapping[str, Any]) -> dict[str, Any] | None:
    """A config.json as far as arguments tell: Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE or Mixtral, by what they have.

    The vocabulary has the padded size where the arguments state no other.

    Returns:
        None: there are no arguments of a model.

    Raises:
        JobError: they describe a model that they do not describe completely.
    """
    if args.get("num_layers") is None:
        return None
    _check_known(args)
    heads, vocab = args["num_attention_heads"], args.get("vocab_size") or args.get("padded_vocab_size")
    # num_query_groups is 1 by default, and read only if group_query_attention is on.
    groups = args.get("num_query_groups") if args.get("group_query_attention") else None
    config: dict[str, Any] = {
        "hidden_act": "silu",
        "vocab_size": vocab,
        "num_hidden_layers": args["num_layers"],
        "hidden_size": args["hidden_size"],
        "num_attention_heads": heads,
        "num_key_value_heads": groups or heads,
        "intermediate_size": args["ffn_hidden_size"],
        "max_position_embeddings": args["max_position_embeddings"],
        "rms_norm_eps": args.get("norm_epsilon") or args.get("layernorm_epsilon"),
        "rope_theta": float(args.get("rotary_base") or 10000),
        "tie_word_embeddings": not args.get("untie_embeddings_and_output_weights"),
        "head_dim": args.get("kv_channels") or args["hidden_size"] // heads,
    }
    if args.get("init_method_std"):
        config["initializer_range"] = args["init_method_std"]
    if scaling := _rope_scaling(args):
        config["rope_scaling"] = scaling
    return {**config, **_family(args)}


def _rope_scaling(args: Mapping[str, Any]) -> dict[str, Any]:
    """A config's ``rope_scaling``; {} where the frequencies are the plain ones."""
    linear = args.get("rotary_seq_len_interpolation_factor") or 1
    if not args.get("use_rope_scaling"):
        return {"rope_type": "linear", "factor": float(linear)} if linear != 1 else {}
    if linear != 1:
        raise _unreadable(f"rotary_seq_len_interpolation_factor is {linear!r} beside use_rope_scaling")
    return {"rope_type": "llama3", "factor": float(args.get("rope_scaling_factor") or 8.0), **_LLAMA3}


def _check_known(args: Mapping[str, Any]) -> None:
    """Refuse arguments that lack something, or that describe another kind of model."""
    missing = [name for name in _NEEDED if not args.get(name)]
    if not args.get("vocab_size") and not args.get("padded_vocab_size"):
        missing.append("padded_vocab_size")
    if not args.get("norm_epsilon") and not args.get("layernorm_epsilon"):
        missing.append("norm_epsilon")
    if missing:
        raise _unreadable(f"they lack {', '.join(missing)}")
    for name, allowed in _FIXED.items():
        if args.get(name) not in allowed:
            raise _unreadable(f"{name} is {args.get(name)!r}")
    for name in _ABSENT:
        if args.get(name):
            raise _unreadable(f"{name} is {args[name]!r}")
    if args.get("position_embedding_type") != "rope" and not args.get("use_rotary_position_embeddings"):
        raise _unreadable(f"position_embedding_type is {args.get('position_embedding_type')!r}")


def _family(args: Mapping[str, Any]) -> dict[str, Any]:
    """The family, by what it has that others lack, and its own keys."""
    normed, biased, all_biased = (args.get(name) for name in ("qk_layernorm", "add_qkv_bias", "add_bias_linear"))
    window = args.get("window_size")
    has = [
        name
        for name in ("num_experts", "qk_layernorm", "add_qkv_bias", "add_bias_linear", "window_size")
        if args.get(name)
    ]
    if args.get("num_experts"):
        if biased or all_biased or window:
            raise _unreadable(f"no family here has {' and '.join(has)}")
        return _mixture(args)
    if len(has) > 1 and has != ["add_qkv_bias", "add_bias_linear"]:
        raise _unreadable(f"no family here has {' and '.join(has)}")
    if normed:
        return {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    if all_biased:
        return _llama(biased=True)
    if biased:
        return {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    if window:
        # Megatron counts the keys to the left of the query, transformers the query too.
        return {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window[0] + 1}
    return _llama(biased=False)


def _llama(biased: bool) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": biased,
        "mlp_bias": biased,
    }


def _mixture(args: Mapping[str, Any]) -> dict[str, Any]:
    layers, experts = range(args["num_layers"]), args["num_experts"]
    frequency = args.get("moe_layer_freq") or 1  # a number n: every n-th layer, the first being one; or a list of 0, 1
    if isinstance(frequency, int):
        frequency = [int(layer % frequency == 0) for layer in layers]
    if not isinstance(frequency, (list, tuple)) or len(frequency) != len(layers):
        raise _unreadable(f"moe_layer_freq is {frequency!r}")
    width, top_k = args.get("moe_ffn_hidden_size") or args["ffn_hidden_size"], args.get("moe_router_topk")
    if not top_k:
        raise _unreadable("they lack moe_router_topk")
    if args.get("qk_layernorm"):
        return {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "num_experts": experts,
            "num_experts_per_tok": top_k,
            "moe_intermediate_size": width,
            # The k largest of a softmax over the k logits sum to one; those of one over all experts do not.
            "norm_topk_prob": not args.get("moe_router_pre_softmax"),
            "mlp_only_layers": [layer for layer in layers if not frequency[layer]],
        }
    if args.get("moe_router_pre_softmax") or not all(frequency):
        raise _unreadable("a mixture without qk_layernorm is Mixtral's, which has one in every layer, normalised")
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "intermediate_size": width,
        "sliding_window": None,
    }


def _unreadable(problem: str) -> JobError:
    return JobError("hf_config", f"the model cannot be read from the checkpoint's args: {problem}", _REMEDY)


def arguments_of_model(
    transformer: Mapping[str, Any], gpt: Mapping[str, Any], rope: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The arguments that make Megatron-LM build a model; for a new checkpoint, and for ``--use-checkpoint-args``.

    Args:
        transformer: TransformerConfig's arguments (`Family.transformer_config`).
        gpt: GPTModel's (`Family.gpt_model`).
        rope: RoPE parameters in transformers 5's form.

    Raises:
        JobError: no arguments say what the model is; with others Megatron-LM would build another one.
    """
    activation = getattr(transformer.get("activation_func"), "__name__", "silu")
    if activation != "silu":
        raise inexpressible(f"hidden_act {activation} (its gated MLP, swiglu, is always silu's)")
    arguments = {
        _RENAMED.get(name, name): list(value) if isinstance(value, tuple) else value
        for name, value in transformer.items()
        if value is None or isinstance(value, (bool, int, float, str, list, tuple))
    }
    longest = gpt["max_sequence_length"]
    arguments |= {
        "vocab_size": gpt["vocab_size"],
        "max_position_embeddings": longest,
        "seq_length": longest,
        "position_embedding_type": gpt["position_embedding_type"],
        "add_position_embedding": True,  # the default; with rope it adds nothing
        "rotary_percent": gpt["rotary_percent"],
        "rotary_base": gpt["rotary_base"],
        "untie_embeddings_and_output_weights": not gpt["share_embeddings_and_output_weights"],
        "group_query_attention": transformer["num_query_groups"] != transformer["num_attention_heads"],
        "transformer_impl": "transformer_engine",
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    if rope and not transformer.get("multi_latent_attention"):  # whose own arguments say it all
        arguments |= _rope_arguments(rope)
    return arguments


def _rope_arguments(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a scaling of frequencies."""
    kind, factor = rope["rope_type"], rope.get("factor")
    if kind == "default":
        return {}
    if kind == "linear" and factor == int(rope["factor"]):
        return {"rotary_seq_len_interpolation_factor": int(rope["factor"])}
    differing = [name for name, value in _LLAMA3.items() if rope.get(name) != value]
    if kind == "llama3" and not differing:
        return {"use_rope_scaling": True, "rope_scaling_factor": factor}
    stated = ", ".join(f"{name} {rope.get(name)}" for name in (differing if kind == "llama3" else ["factor"]))
    known = "linear with a whole factor, and llama3 with " + ", ".join(f"{name} {_LLAMA3[name]}" for name in _LLAMA3)
    raise inexpressible(f"RoPE of type {kind} with {stated} (it knows {known})")


def inexpressible(what: str) -> JobError:
    """The refusal of a legacy checkpoint of a model that Megatron-LM's arguments do not describe."""
    return JobError(
        "source",
        f"a legacy checkpoint carries Megatron-LM's arguments, and none of them say {what}",
        "use torch_dist (reshard --format torch_dist), or convert megatron-to-hf",
    )
