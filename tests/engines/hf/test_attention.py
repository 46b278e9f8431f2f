"""Sequences side by side in one row compute what each computes alone; what cannot be kept apart is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from swift_dist.engines.hf import attention

COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, all heads": {"num_key_value_heads": 4},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "gemma2": {"sliding_window": 4, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "gpt_oss": {"sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {},
    "olmo2": {},
    "deepseek_v3": {
        "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4, "v_head_dim": 6, "num_key_value_heads": 4, "head_dim": None,
    },
}  # fmt: skip
LENGTHS = [7, 1, 12, 3]


def make(name: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {k: v for k, v in {**COMMON, **MODELS[name]}.items() if v is not None}
    torch.manual_seed(1)
    config = AutoConfig.for_model(name.partition(",")[0], **values)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def packed(model: Any, row: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    attention.register()
    model.set_attn_implementation(attention.NAME)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return model(
        input_ids=row, position_ids=positions, use_cache=False, **attention.boundaries(lengths, row.device)
    ).logits[0]


@pytest.mark.parametrize("name", MODELS)
def test_packed_sequences_are_as_alone(name: str) -> None:
    model = make(name)
    assert attention.refusal(model) is None
    row = torch.randint(1, 61, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    parts = row[0].split(LENGTHS)
    alone = torch.cat([model(input_ids=part[None], use_cache=False).logits[0] for part in parts])
    alone.square().sum().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    together = packed(model, row, LENGTHS)
    together.square().sum().backward()
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    for n, p in model.named_parameters():
        if n in wanted:
            torch.testing.assert_close(p.grad, wanted[n], rtol=1e-4, atol=1e-4 * wanted[n].abs().max().item())
    as_one = packed(model, row, [sum(LENGTHS)])
    assert (as_one - alone).abs().max() > 1e-2, "the test would not notice one long sequence"


def test_a_model_that_hands_nothing_on_is_an_error() -> None:
    q = torch.randn(1, 2, 5, 4)
    with pytest.raises(RuntimeError, match="does not hand on"):
        attention.packed_attention(torch.nn.Linear(1, 1), q, q, q, None)
    with pytest.raises(RuntimeError, match="does not hand on"):
        attention.packed_attention(torch.nn.Linear(1, 1), q, q, q, None, sequence_lengths=attention.Lengths((2, 2)))


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("mamba", {"state_size": 4}, "attention"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "state"),
        ("bloom", {}, "attention"),
        ("roberta", {"is_decoder": True, "pad_token_id": 1}, "do not begin at 0"),
    ],
)
def test_models_that_cannot_are_refused(name: str, values: dict[str, Any], reason: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name, **{**COMMON, **values})
    model = AutoModelForCausalLM.from_config(config)
    assert reason in (attention.refusal(model) or "")
