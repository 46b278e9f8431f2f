"""One architecture: a tiny random model of it, and what its adapter computes when it is loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SMALL = {
    "vocab_size": 512, "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32, "embedding_size": 32,
    "word_embed_proj_dim": 32, "intermediate_size": 64, "ffn_dim": 64, "d_ff": 64, "n_inner": 64, "ffn_hidden_size": 64,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8, "decoder_ffn_dim": 64,
    "encoder_ffn_dim": 64, "max_position_embeddings": 256, "n_positions": 256, "max_seq_len": 256,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "sliding_window": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    "is_decoder": True, "state_size": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "lru_width": 32, "num_hash_buckets": 64, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512,
    "moe_topk": 2, "moe_k": 2, "use_mamba_kernels": False, "time_step_rank": 4, "dense_intermediate_size": 64,
    "ffn_hidden_dim": 64, "multiple_of": 8, "rotary_dim": 8, "attention_window": 32, "initializer_range": 0.1,
}  # fmt: skip


OF_TYPE: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8},
}
"""What must fit together in one architecture."""


def _can_be_set(config: Any, name: str) -> bool:
    name = type(config).attribute_map.get(name, name)
    of_class = getattr(type(config), name, None)
    return not isinstance(of_class, property) or of_class.fset is not None


def _settable(config: Any) -> dict[str, Any]:
    """What SMALL says of this config."""
    found = {}
    for name, value in SMALL.items():
        try:
            there = hasattr(config, name)
        except Exception:  # a number that differs by layer
            there = True
        if there and _can_be_set(config, name):
            found[name] = value
    if "qk_rope_head_dim" in found and "head_dim" in found:
        found["head_dim"] = found["qk_rope_head_dim"]  # DeepSeek's means the rotated part
    return found


def save_tiny(worker: Any, model_type: str, folder: str) -> dict[str, Any]:
    """A tiny model of `model_type` in `folder`; {"class", "parameters", "packs"} or {"error"}."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from swift_dist.engines.hf import attention

    try:
        default = AutoConfig.for_model(model_type)
        values = {**_settable(default), **OF_TYPE.get(model_type, {})}
        is_own = _can_be_set(default, "layer_types")
        if is_own and isinstance(getattr(default, "layer_types", None), list) and "num_hidden_layers" in values:
            kinds = list(dict.fromkeys(default.layer_types))
            values["num_hidden_layers"] = max(2, len(kinds))
            values["layer_types"] = (kinds * 2)[: values["num_hidden_layers"]]
        text = getattr(default, "text_config", None)
        if text is not None and not isinstance(text, dict):
            values = {
                "text_config": {
                    "model_type": text.model_type,
                    **_settable(text),
                    **OF_TYPE.get(text.model_type, {}),
                }
            }
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if parameters > 30_000_000:
            return {"error": f"no small model of it was made: {parameters:,} parameters"}
        model.save_pretrained(folder)
        reason = attention.refusal(model)
        return {"class": type(model).__name__, "parameters": parameters, "packs": reason is None}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}


def reload(worker: Any, base: str, adapter: str, merged: str, packs: bool) -> dict[str, Any]:
    """Largest differences of logits: what the adapter changes, adapter against merged, packed against alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from swift_dist.engines.hf import attention
    from swift_dist.tuners._merge import merge

    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        plain = model(input_ids=ids, use_cache=False).logits
        packed = 0.0
        if packs:
            parts = [model(input_ids=part, use_cache=False).logits for part in ids.split([7, 5], dim=1)]
            alone = torch.cat(parts, dim=1)
            attention.register()
            model.set_attn_implementation(attention.NAME)
            positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
            row = model(
                input_ids=ids, position_ids=positions, use_cache=False, **attention.boundaries([7, 5], ids.device)
            )
            packed = float((row.logits - alone).abs().max() / alone.abs().max())
        fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapted = PeftModel.from_pretrained(fresh, adapter).eval()(input_ids=ids, use_cache=False).logits
        merge(Path(base), Path(adapter), Path(merged))
        joined: Any = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
        whole = joined(input_ids=ids, use_cache=False).logits
    scale = plain.abs().max()
    return {
        "changed": float((adapted - plain).abs().max() / scale),
        "merged": float((whole - adapted).abs().max() / scale),
        "packed": packed,
    }
