"""Megatron-LM's arguments and a config.json, each from the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from swift_dist.converters.legacy_arguments import arguments_of_model, config_of_arguments
from swift_dist.errors import JobError
from swift_dist.models import find_family, rope_parameters


@pytest.mark.parametrize("name", ["llama", "llama_biased", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral"])
def test_arguments_and_config_are_each_others_inverse(name: str, save_model: Callable[[str], Any]) -> None:
    found = save_model(name)
    transformer = found.family.transformer_config(found.hf)
    config = config_of_arguments(arguments_of_model(transformer, found.family.gpt_model(found.hf)))
    assert config is not None
    family = find_family(config)
    assert family.name == found.family.name and family.rows(config) == found.rows
    assert family.transformer_config(config) == transformer
    assert family.gpt_model(config) == found.family.gpt_model(found.hf)


LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def arguments_with(found: Any, **changes: Any) -> dict[str, Any]:
    hf = {**found.hf, **changes}
    family = found.family
    rope = rope_parameters(family.complete(hf))
    return arguments_of_model(family.transformer_config(hf), family.gpt_model(hf), rope)


@pytest.mark.parametrize("scaling", [LLAMA3, {"rope_type": "linear", "factor": 4.0}, {"rope_type": "default"}])
def test_rope_is_kept(scaling: dict[str, Any], save_model: Callable[[str], Any]) -> None:
    found = save_model("llama")
    stated = {"rope_parameters": {**scaling, "rope_theta": 5e5}}
    config = config_of_arguments(arguments_with(found, **stated))
    assert config is not None and found.family.rope(config) == found.family.rope({**found.hf, **stated})


def test_interpolation_of_positions() -> None:
    """--rotary-seq-len-interpolation-factor; 1, which is in many scripts, changes nothing."""
    sizes = dict.fromkeys(("num_layers", "num_attention_heads", "padded_vocab_size", "max_position_embeddings"), 4)
    args = {**sizes, "hidden_size": 16, "ffn_hidden_size": 16, "norm_epsilon": 1e-5, "normalization": "RMSNorm"}
    args |= {"swiglu": True, "position_embedding_type": "rope"}
    name = "rotary_seq_len_interpolation_factor"
    for factor, expected in ((None, None), (1, None), (4, {"rope_type": "linear", "factor": 4.0})):
        config = config_of_arguments({**args, name: factor})
        assert config is not None and config.get("rope_scaling") == expected
    with pytest.raises(JobError, match=f"{name} is 4 beside use_rope_scaling"):
        config_of_arguments({**args, name: 4, "use_rope_scaling": True})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"rope_parameters": YARN}, "RoPE of type yarn with factor 4.0"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.5}}, "RoPE of type linear with factor 2.5"),
        ({"rope_parameters": {**LLAMA3, "high_freq_factor": 8.0}}, "llama3 with high_freq_factor 8.0 "),
        (
            {"rope_parameters": {**LLAMA3, "low_freq_factor": 2.0, "original_max_position_embeddings": 32}},
            "llama3 with low_freq_factor 2.0, original_max_position_embeddings 32 ",
        ),
    ],
)
def test_a_model_that_no_arguments_describe(
    changes: dict[str, Any], message: str, save_model: Callable[[str], Any]
) -> None:
    with pytest.raises(JobError, match=message) as caught:
        arguments_with(save_model("llama"), **changes)
    assert caught.value.key == "source" and "megatron-to-hf" in caught.value.remedy


def test_latent_attention_states_its_own_rope(save_model: Callable[[str], Any]) -> None:
    args = arguments_with(save_model("deepseek_v3"), rope_parameters=YARN)
    assert args["rope_type"] == "yarn" and args["rotary_scaling_factor"] == 4.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None, "padded_vocab_size": None, "vocab_size": None}, "lack hidden_size, padded_vocab_size"),
        ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm'"),
        ({"normalization": None}, "normalization is None"),
        ({"multi_latent_attention": True}, "multi_latent_attention"),
        ({"moe_shared_expert_intermediate_size": 8}, "moe_shared_expert_intermediate_size"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type"),
        ({"qk_layernorm": True, "add_qkv_bias": True}, "no family here has qk_layernorm and add_qkv_bias"),
    ],
)
def test_arguments_that_do_not_say_enough(
    changes: dict[str, Any], message: str, save_model: Callable[[str], Any]
) -> None:
    found = save_model("llama")
    args = arguments_of_model(found.family.transformer_config(found.hf), found.family.gpt_model(found.hf))
    with pytest.raises(JobError, match=message) as caught:
        config_of_arguments({**args, **changes})
    assert caught.value.key == "hf_config"
    assert config_of_arguments({}) is None
