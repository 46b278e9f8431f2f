"""Tiny random Hugging Face models of every family, for tests of rows and conversions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "mlp_bias": False},
    "llama_biased": {"num_key_value_heads": 4, "mlp_bias": True, "attention_bias": True, "tie_word_embeddings": True},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 8, "head_dim": 16},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 16},
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "mixtral": {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    # Two of four groups: megatron then scores a group by its best expert, as DeepSeek-V2 does.
    "deepseek_v2": {**DEEPSEEK, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "deepseek_v2_lite": {**DEEPSEEK, "q_lora_rank": None, "n_group": 1},
    "deepseek_v3": DEEPSEEK,
    "deepseek_v3_mtp": {**DEEPSEEK, "num_mtp_layers": 1},
}
TRAINED = ("llama", "llama_biased", "mistral", "qwen2", "qwen3", "qwen3_moe")
COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def tiny_model(name: str, **changes: Any) -> Any:
    """A random model in fp32 (every weight drawn, norms and biases too, so that nothing is equal by accident)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type(name), **{**COMMON, **CONFIGS[name], **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        biases = [bias for key, bias in model.named_buffers() if key.endswith("e_score_correction_bias")]
        for parameter in (*model.parameters(), *biases):
            parameter.normal_(0.0, 0.05)
    return model.eval()


def save_tiny_model(name: str, folder: Path, **changes: Any) -> Any:
    model = tiny_model(name, **changes)
    model.save_pretrained(folder)
    if name.endswith("_mtp"):
        add_mtp_layer(folder)
    return model


def model_type(name: str) -> str:
    """The model type of a name in `CONFIGS`."""
    for suffix in ("_biased", "_lite", "_mtp"):
        name = name.removesuffix(suffix)
    return name


def add_mtp_layer(folder: Path) -> None:
    """Give a saved DeepSeek-V3 the multi-token-prediction layer that the published folder has and transformers' class
    leaves out: a decoder layer after the last one, two norms, a projection, and copies of embedding and output layer.
    """
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    hidden, last = config["hidden_size"], config["num_hidden_layers"] - 1
    before, added = f"model.layers.{last}.", f"model.layers.{last + 1}."
    generator = torch.Generator().manual_seed(1)
    shapes = {key.replace(before, added): values.shape for key, values in tensors.items() if key.startswith(before)}
    shapes |= {f"{added}{norm}.weight": (hidden,) for norm in ("enorm", "hnorm", "shared_head.norm")}
    shapes[f"{added}eh_proj.weight"] = (hidden, 2 * hidden)
    tensors |= {key: torch.randn(shape, generator=generator) * 0.05 for key, shape in shapes.items()}
    tensors[f"{added}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{added}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
