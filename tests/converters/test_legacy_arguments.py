"""Megatron-LM's arguments and a config.json, each from the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from swift_dist.converters.legacy_arguments import arguments_of_model, config_of_arguments
from swift_dist.errors import JobError
from swift_dist.models import find_family


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


def test_llama3_scaling_is_kept(save_model: Callable[[str], Any]) -> None:
    found = save_model("llama")
    rope = {"rope_type": "llama3", "factor": 32.0}
    args = arguments_of_model(found.family.transformer_config(found.hf), found.family.gpt_model(found.hf), rope)
    config = config_of_arguments(args)
    assert config is not None and config["rope_scaling"]["factor"] == 32.0


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
