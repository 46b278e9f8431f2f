"""What a model's configuration says against sharing its rows, or against a ring. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PLAIN_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})
"""Kinds of layers (``layer_types``) in which nothing but attention carries one token's state to another."""

_NOT_BY_ATTENTION_ALONE = frozenset(
    (
        "axk2 bailing_hybrid bamba bart big_bird bigbird_pegasus biogpt blenderbot blenderbot-small bloom "
        "camembert codegen cpmant data2vec-text deepseek_v32 doge falcon falcon_h1 falcon_mamba glm_moe_dsa "
        "gpt_neo gpt_neox_japanese gptj granitemoehybrid hy_v4 inkling2_text inkling_text jamba kimi_linear lfm3 "
        "llama4 llama4_text mamba mamba2 marian mbart megatron-bert minimax mpt mvp nemotron nemotron_h "
        "olmo_hybrid openai-gpt pegasus plbart qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next "
        "qwen4_exp recurrent_gemma rembert roberta roberta-prelayernorm roformer rwkv stablelm trocr whisper xglm "
        "xlm xlm-roberta xlm-roberta-xl xlstm zamba zamba2"
    ).split()
)
"""Types in which tokens meet where transformers' attention interface does not reach (docs/tables/architectures.md:
those that do not pack, and some of which no tiny model was made)."""
_SOFTCAPPED = ("gemma2", "t5gemma", "vaultgemma")
"""Types whose scores have a softcap where config.json does not say that they have none."""
_SINKS = ("gpt_oss", "mimo_v2_flash", "granite_swa", "granitemoe_swa", "flint", "hy_v4", "openai_privacy_filter")
_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


def row_refusal(config: Mapping[str, Any]) -> str | None:
    """Why ranks cannot share this model's rows; None: its configuration does not tell (its modules may:
    `engines.hf.attention.refusal`).

    Args:
        config: of the text model, as config.json or transformers has it.
    """
    kinds = config.get("layer_types")
    if kinds and not PLAIN_LAYERS.issuperset(kinds):
        return f"its {', '.join(sorted(set(kinds) - PLAIN_LAYERS))} layers carry state from one token to the next"
    if not kinds and config.get("model_type") in _NOT_BY_ATTENTION_ALONE:
        return f"tokens of {config['model_type']} meet where transformers' attention interface does not reach"
    return None


def ring_refusal(config: Mapping[str, Any]) -> str | None:
    """Why this model's attention cannot go round a ring, whose blocks are merged by their normalisers; None: it can.

    Args:
        config: see `row_refusal`.
    """
    kind = str(config.get("model_type", "")).removesuffix("_text")
    if config.get("attn_logit_softcapping", 50.0 if kind in _SOFTCAPPED else None):
        return "its attention has a softcap"
    if kind in _SINKS:
        return "its attention has sinks"
    for name in _DROPOUT:
        if config.get(name):
            return f"its attention has a dropout ({name} {config[name]:g})"
    keys = config.get("head_dim")
    if config.get("kv_lora_rank") and config.get("qk_rope_head_dim"):  # latent attention (DeepSeek)
        keys = (config.get("qk_nope_head_dim") or 0) + config["qk_rope_head_dim"]
    values = config.get("v_head_dim")
    if keys and values and keys != values:
        return f"its attention has values of {values} numbers and keys of {keys}"
    return None
