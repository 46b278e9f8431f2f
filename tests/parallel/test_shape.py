"""Parameter counts against transformers' models, FLOPs against a count of the model's own matrix products."""

from __future__ import annotations

import pytest

from swift_dist.models import find_family
from swift_dist.parallel import ModelShape

SMALL = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MIXTURE = {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
DEEPSEEK = {
    **SMALL,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "topk_method": "noaux_tc",
    "tie_word_embeddings": False,
}
CONFIGS = {
    "llama": {"model_type": "llama", **SMALL},
    "llama, tied, biases": {
        "model_type": "llama",
        **SMALL,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral": {"model_type": "mistral", **SMALL, "sliding_window": 8},
    "qwen2": {"model_type": "qwen2", **SMALL},
    "qwen3, wide heads": {"model_type": "qwen3", **SMALL, "head_dim": 32, "tie_word_embeddings": True},
    "qwen3_moe": {"model_type": "qwen3_moe", **SMALL, **MIXTURE, "head_dim": 32},
    "qwen3_moe, one plain layer": {"model_type": "qwen3_moe", **SMALL, **MIXTURE, "mlp_only_layers": [1]},
    "mixtral": {
        "model_type": "mixtral",
        **SMALL,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "deepseek_v3": {"model_type": "deepseek_v3", **DEEPSEEK, "q_lora_rank": 20},
    "deepseek_v3, direct queries": {"model_type": "deepseek_v3", **DEEPSEEK, "q_lora_rank": None},
}


def shape_of(hf: dict) -> ModelShape:
    return find_family(hf).shape(hf)


def build(hf: dict, device: str, **changes):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{**hf, **changes})
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("name", CONFIGS)
def test_number_of_parameters(name):
    model = build(CONFIGS[name], "meta")
    count = sum(p.numel() for p in model.parameters())
    count += sum(b.numel() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))
    assert shape_of(CONFIGS[name]).num_parameters() == count


@pytest.mark.parametrize("name", [name for name in CONFIGS if shape_of(CONFIGS[name]).is_moe])
def test_number_of_active_parameters(name):
    """A token's experts are moe_top_k of num_experts, the router whole."""
    hf, shape = CONFIGS[name], shape_of(CONFIGS[name])
    all_experts = [p.numel() for n, p in build(hf, "meta").named_parameters() if ".experts." in n and "shared" not in n]
    idle = sum(all_experts) * (shape.num_experts - shape.moe_top_k) / shape.num_experts
    assert shape.num_active_parameters() == shape.num_parameters() - idle


@pytest.mark.parametrize("name", ["llama", "llama, tied, biases", "qwen2", "qwen3, wide heads"])
def test_flops_against_torchs_own_count(name):
    """torch counts every product of eager attention, also above the diagonal: S keys a token instead of (S + 1) / 2."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    sequence_length, shape = 32, shape_of(CONFIGS[name])
    model = build(CONFIGS[name], "cpu")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, sequence_length, dtype=torch.long)).logits.sum().backward()
    attention = 12 * shape.num_layers * shape.num_attention_heads * shape.head_dim
    masked = attention * (sequence_length - (sequence_length + 1) / 2) * sequence_length
    ours = shape.flops_per_token(sequence_length) * sequence_length + masked
    assert counter.get_total_flops() == pytest.approx(ours, rel=1e-9)


def test_flops_of_a_mixture_count_the_experts_that_work():
    shape = shape_of(CONFIGS["qwen3_moe"])
    more = ModelShape(**{**vars(shape), "moe_top_k": 3})
    one_expert = 3 * 64 * 24
    assert more.flops_per_token(16) - shape.flops_per_token(16) == 3 * 2 * 3 * one_expert


def test_window_shortens_attention():
    full = shape_of(CONFIGS["llama"])
    windowed = ModelShape(**{**vars(full), "sliding_window": 8})
    per_key = 3 * full.num_layers * 2 * 2 * full.head_dim * full.num_attention_heads
    mean_keys = sum(min(i + 1, 8) for i in range(32)) / 32
    assert full.flops_per_token(32) - windowed.flops_per_token(32) == pytest.approx(per_key * (16.5 - mean_keys))
    assert windowed.flops_per_token(8) == full.flops_per_token(8)


@pytest.mark.parametrize(("vocab", "tp", "padded"), [(500, 1, 512), (512, 1, 512), (513, 1, 640), (500, 8, 1024)])
def test_padded_vocabulary(vocab, tp, padded):
    shape = ModelShape(**{**vars(shape_of(CONFIGS["llama"])), "vocab_size": vocab})
    assert shape.padded_vocab_size(tp) == padded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_query_groups": 3}, "not a multiple"),
        ({"num_experts": 4}, "moe_top_k"),
        ({"num_dense_layers": 1}, "num_experts"),
    ],
)
def test_impossible_geometry(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelShape(**{**vars(shape_of(CONFIGS["llama"])), **changes})
