"""Tiny random Hugging Face models of every family, for tests of rows and conversions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

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
}
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

    config = AutoConfig.for_model(name.removesuffix("_biased"), **{**COMMON, **CONFIGS[name], **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.05)
    return model.eval()


def save_tiny_model(name: str, folder: Path, **changes: Any) -> Any:
    model = tiny_model(name, **changes)
    model.save_pretrained(folder)
    return model
