from __future__ import annotations

from typing import Any

import pytest
import torch

from swift_dist.models import find_family

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 4096,
}
SCALINGS: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "linear_old_name": {"type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
    "yarn_attention_factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7},
    "yarn_mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 1.2, "mscale_all_dim": 0.8, "beta_fast": 16},
    "yarn_untruncated": {"type": "yarn", "factor": 8.0, "truncate": False, "beta_slow": 2},
}
SIZES = {
    "vocab_size": 8,
    "hidden_size": 256,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}


def theirs(model_type: str, keys: dict[str, Any]) -> Any:
    """transformers' rotary embedding of such a model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **keys)).model.rotary_emb


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_bit_equal_to_transformers(name: str, version: int, theta: float) -> None:
    scaling = SCALINGS[name]
    if version == 4:
        keys = SIZES | {"rope_theta": theta, "rope_scaling": scaling}
    else:
        keys = SIZES | {"rope_parameters": {**(scaling or {}), "rope_theta": theta}}
    expected = theirs("llama", {key: dict(v) if isinstance(v, dict) else v for key, v in keys.items()})
    rope = find_family({"model_type": "llama"}).rope(keys)
    assert torch.equal(torch.tensor(rope.inverse_frequencies, dtype=torch.float32), expected.inv_freq)
    assert rope.attention_scaling == expected.attention_scaling


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "qwen3_moe"])
def test_every_family_uses_its_head_dim(model_type: str) -> None:
    small = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8} if "moe" in model_type else {}
    keys = SIZES | small | {"head_dim": 64, "rope_theta": 1e6}
    rope = find_family({"model_type": model_type}).rope(keys)
    expected = theirs(model_type, keys).inv_freq
    assert torch.equal(torch.tensor(rope.inverse_frequencies, dtype=torch.float32), expected)


@pytest.mark.parametrize("name", SCALINGS)
def test_megatron_reads_the_attention_scaling(name: str) -> None:
    from types import SimpleNamespace

    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
        _yarn_get_concentration_factor_from_config as megatrons,
    )

    rope = find_family({"model_type": "llama"}).rope(SIZES | {"rope_scaling": SCALINGS[name]})
    assert megatrons(SimpleNamespace(**rope.megatron_attributes())) == pytest.approx(rope.attention_scaling, rel=1e-15)


def test_stated_length_outside_wins() -> None:
    """A top-level original_max_position_embeddings has priority in transformers."""
    keys = SIZES | {"rope_theta": 10000.0, "rope_scaling": dict(LLAMA3), "original_max_position_embeddings": 1024}
    expected = theirs("llama", {**keys, "rope_scaling": dict(LLAMA3)}).inv_freq
    rope = find_family({"model_type": "llama"}).rope(keys)
    assert torch.equal(torch.tensor(rope.inverse_frequencies, dtype=torch.float32), expected)
