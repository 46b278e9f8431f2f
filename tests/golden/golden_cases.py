"""What the golden tests compare: tiny models of every family, the layouts, and the step both sides do.

Weights are random everywhere, also where an initialiser would write zeros or ones, so that a bias or a norm that is not
used shows. The vocabulary is no multiple of 128, so that padding shows. Some tokens do not count in the loss, and not
the same number in each micro-batch, so that a wrong normalisation shows.
"""

from __future__ import annotations

from typing import Any

from swift_dist.parallel import ParallelLayout

SEQUENCE, GLOBAL_BATCH, STEPS = 32, 8, 4
LR, WEIGHT_DECAY, BETAS, EPS, CLIP = 1e-3, 0.1, (0.9, 0.95), 1e-8, 1.0

_TINY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_TINY, "rope_parameters": _LLAMA3_ROPE},
    "llama-tied": {"model_type": "llama", **_TINY, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **_TINY, "sliding_window": 7},
    "qwen2": {"model_type": "qwen2", **_TINY, "tie_word_embeddings": True},
    "qwen2-window": {
        "model_type": "qwen2",
        **_TINY,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 2,
    },
    "qwen3": {"model_type": "qwen3", **_TINY, "head_dim": 32, "rope_parameters": _YARN},
    "qwen3_moe": {"model_type": "qwen3_moe", **_TINY, **_EXPERTS},
    "qwen3_moe-mixed": {
        "model_type": "qwen3_moe",
        **_TINY,
        **_EXPERTS,
        "norm_topk_prob": False,
        "mlp_only_layers": [1],
        "tie_word_embeddings": True,
    },
}
"""The first model of a family stands for it in the smaller table."""

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP1": {"world_size": 1},
    "TP2": {"world_size": 2, "tp": 2},
    "TP2+SP": {"world_size": 2, "tp": 2, "sequence_parallel": True},
    "PP2": {"world_size": 2, "pp": 2},
    "PP2xVPP2": {"world_size": 2, "pp": 2, "vpp": 2},
    "CP2": {"world_size": 2, "cp": 2},
    "DP2+distopt": {"world_size": 2},
    "EP2": {"world_size": 2, "ep": 2},
    "TP2PP2DP2+SP": {"world_size": 8, "tp": 2, "pp": 2, "sequence_parallel": True},
    "TP2CP2DP2": {"world_size": 8, "tp": 2, "cp": 2},
}


def layout(name: str) -> ParallelLayout:
    return ParallelLayout(**LAYOUTS[name])


def job(model: str, name: str, **train: Any) -> dict[str, Any]:
    """The job of a cell, as the engine takes it."""
    degrees = layout(name)
    return {
        "model": {"config": MODELS[model]},
        "data": {"sequence_length": SEQUENCE},
        "train": {
            "steps": STEPS,
            "micro_batch_size": 1,
            "global_batch_size": GLOBAL_BATCH,
            "precision": "fp32",
            **train,
        },
        "optimizer": {"lr": LR, "weight_decay": WEIGHT_DECAY, "betas": BETAS, "eps": EPS, "clip_grad": CLIP},
        "schedule": {"name": "constant"},
        "parallel": {
            "tensor_model_parallel_size": degrees.tp,
            "pipeline_model_parallel_size": degrees.pp,
            "virtual_pipeline_model_parallel_size": degrees.vpp,
            "context_parallel_size": degrees.cp,
            "expert_model_parallel_size": degrees.ep,
            "sequence_parallel": degrees.sequence_parallel,
            "use_distributed_optimizer": "distopt" in name or degrees.world_size == 8,
        },
    }


def batch(step: int, vocab_size: int, sequence: int = SEQUENCE) -> dict[str, Any]:
    """The global batch of a step: tokens, labels int64 [GLOBAL_BATCH, sequence], loss_mask float32, position_ids."""
    import torch

    generator = torch.Generator().manual_seed(1000 + step)
    text = torch.randint(0, vocab_size, (GLOBAL_BATCH, sequence + 1), generator=generator)
    density = torch.linspace(0.4, 1.0, GLOBAL_BATCH)[:, None]
    mask = (torch.rand(GLOBAL_BATCH, sequence, generator=generator) < density).float()
    return {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "loss_mask": mask,
        "position_ids": torch.arange(sequence).expand(GLOBAL_BATCH, sequence).contiguous(),
    }


def share(whole: dict[str, Any], dp_rank: int, dp_size: int, micro_batch_size: int = 1) -> list[dict[str, Any]]:
    """A data-parallel rank's micro-batches of a global batch."""
    parts = []
    for first in range(dp_rank * micro_batch_size, GLOBAL_BATCH, dp_size * micro_batch_size):
        parts.append({name: tensor[first : first + micro_batch_size] for name, tensor in whole.items()})
    return parts
