from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest

from swift_dist.errors import JobError
from swift_dist.models import Family, families, find_family

FAMILIES = {family.name: family for family in families()}
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def hf_class(family: Family, **keys: Any) -> Any:
    """transformers' config object."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family.name, **keys)


def test_defaults_are_those_of_transformers(family: Family) -> None:
    """What config.json does not state is what transformers assumes (derived values: compared after completion)."""
    theirs = hf_class(family).to_dict()
    ours = family.complete({})
    for key in family.defaults.keys() - {"layer_types", "router_z_loss_coef", "mlp_only_layers", "num_experts"}:
        if key == "sliding_window" and not theirs.get("use_sliding_window", True):
            continue  # transformers forgets the window where it is switched off
        if key == "head_dim" and key not in theirs:
            assert ours[key] == theirs["hidden_size"] // theirs["num_attention_heads"]
            continue
        assert ours[key] == theirs[key], key
    assert ours.get("num_experts") == getattr(hf_class(family), "num_experts", None)


def test_what_save_pretrained_writes_is_understood(family: Family) -> None:
    hf = hf_class(family, **TINY).to_dict() | {"architectures": list(family.architectures)}
    assert find_family(hf) is family
    assert family.shape(hf).hidden_size == 32


@pytest.mark.parametrize("keys", [{}, TINY], ids=["defaults", "tiny"])
def test_parameter_count_equals_transformers(family: Family, keys: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_class(family, **keys))
    assert family.shape(keys).num_parameters() == sum(parameter.numel() for parameter in model.parameters())


def test_arguments_fit_megatron(family: Family) -> None:
    """Every key is an argument there, and the values pass megatron's own checks."""
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(**family.transformer_config(TINY))
    assert config.kv_channels == family.complete(TINY)["head_dim"]
    assert config.gated_linear_unit and config.activation_func.__name__ == "silu"
    assert family.gpt_model(TINY).keys() <= inspect.signature(GPTModel.__init__).parameters.keys()


def test_biases_and_norms_of_each_family() -> None:
    expected = {
        "llama": (False, False, False),
        "mistral": (False, False, False),
        "qwen2": (False, True, False),
        "qwen3": (False, False, True),
        "qwen3_moe": (False, False, True),
    }
    for name, flags in expected.items():
        config = FAMILIES[name].transformer_config(TINY)
        assert (config["add_bias_linear"], config["add_qkv_bias"], config["qk_layernorm"]) == flags, name
    assert FAMILIES["llama"].transformer_config(TINY | {"attention_bias": True, "mlp_bias": True})["add_bias_linear"]


@pytest.mark.parametrize("window", [1, 5])
def test_window_means_the_same_keys(window: int) -> None:
    import torch
    from transformers.masking_utils import sliding_window_causal_mask_function

    left, right = FAMILIES["mistral"].transformer_config(TINY | {"sliding_window": window})["window_size"]
    theirs = sliding_window_causal_mask_function(window)
    query, key = torch.arange(12)[:, None], torch.arange(12)[None, :]
    assert torch.equal(theirs(0, 0, query, key), (key >= query - left) & (key <= query + right))


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "keys",
    [
        {"use_sliding_window": False, "sliding_window": 8},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 9},
        {"use_sliding_window": True, "sliding_window": None},
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        },
    ],
)
def test_windows_of_single_layers(name: str, keys: dict[str, Any]) -> None:
    theirs = hf_class(FAMILIES[name], **TINY, **keys)
    config = FAMILIES[name].transformer_config(TINY | keys)
    pattern = config.get("window_attn_skip_freq", [int("window_size" in config)] * 4)
    assert pattern == [int(kind == "sliding_attention") for kind in theirs.layer_types]
    if any(pattern):
        assert config["window_size"] == (theirs.sliding_window - 1, 0)


def test_mistral_has_no_window_only_where_it_is_null() -> None:
    assert FAMILIES["mistral"].transformer_config(TINY)["window_size"] == (4095, 0)
    assert "window_size" not in FAMILIES["mistral"].transformer_config(TINY | {"sliding_window": None})
    assert FAMILIES["mistral"].shape(TINY).sliding_window == 4096


def test_layers_with_experts_are_those_of_transformers() -> None:
    from transformers import AutoModelForCausalLM

    family = FAMILIES["qwen3_moe"]
    keys = TINY | {"mlp_only_layers": [2], "decoder_sparse_step": 2, "num_experts": 4, "num_experts_per_tok": 2}
    keys |= {"num_hidden_layers": 6, "moe_intermediate_size": 8}
    model = AutoModelForCausalLM.from_config(hf_class(family, **keys))
    expected = [int(hasattr(layer.mlp, "experts")) for layer in model.model.layers]
    assert family.transformer_config(keys)["moe_layer_freq"] == expected
    assert family.transformer_config(keys | {"mlp_only_layers": [], "decoder_sparse_step": 1})["moe_layer_freq"] == 1


@pytest.mark.parametrize(
    ("name", "keys", "key", "says"),
    [
        ("llama", {"attention_bias": True}, "attention_bias", "biases on all"),
        ("llama", {"sliding_window": 128}, "sliding_window", "not understood"),
        ("llama", {"logit_scale": 0.5}, "logit_scale", "might change the numbers"),
        ("llama", {"attention_sink": 4}, "attention_sink", "not understood"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor", "not understood"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config", "not understood"),
        ("llama", {"hidden_act": "gelu_new"}, "hidden_act", "not supported"),
        ("llama", {"hidden_size": "32"}, "hidden_size", "positive whole number"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers", "positive whole number"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads", "not a multiple"),
        ("llama", {"head_dim": 7}, "head_dim", "odd"),
        ("llama", {"attention_dropout": 1.5}, "attention_dropout", "must be a number"),
        (
            "llama",
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_parameters",
            "'dynamic' is not supported",
        ),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_parameters", "lacks ['factor']"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 1}}, "rope_parameters", "['alpha']"),
        ("mistral", {"sliding_window": 0}, "sliding_window", "positive whole number"),
        ("mistral", {"layer_types": ["full_attention"] * 4}, "layer_types", "sliding_attention in every layer"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 4}, "layer_types", "full_attention or sliding_attention"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "layer_types", "use_sliding_window is off"),
        ("qwen3", {"attention_bias": True}, "attention_bias", "without biases in the MLP"),
        ("qwen3_moe", {"num_experts_per_tok": 200}, "num_experts_per_tok", "more than num_experts"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "mlp_only_layers", "no layer with experts"),
        ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": True}, "norm_topk_prob", "no gradient"),
        ("qwen3_moe", {"num_experts": 8, "num_local_experts": 4}, "num_experts", "num_local_experts is 4"),
    ],
)
def test_refusals_name_the_key(name: str, keys: dict[str, Any], key: str, says: str) -> None:
    with pytest.raises(JobError) as caught:
        FAMILIES[name].shape(TINY | keys)
    assert caught.value.key == f"model.config.{key}"
    assert says in str(caught.value)


def test_switched_off_keys_pass() -> None:
    off = {"logit_scale": None, "attention_sink": False, "partial_rotary_factor": 1.0, "_name_or_path": "x"}
    assert FAMILIES["llama"].shape(TINY | off) == FAMILIES["llama"].shape(TINY)


def test_reading_geometry_needs_no_torch() -> None:
    code = (
        "import sys; from swift_dist.models import find_family; "
        "f = find_family({'model_type': 'qwen3_moe'}); f.shape({}); f.rows({}); f.gpt_model({}); "
        "assert not {'torch', 'numpy', 'transformers', 'megatron', 'huggingface_hub'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_inline_config_states_its_sizes_and_a_misspelt_key_is_named() -> None:
    from swift_dist.models import find_family

    family = find_family({"model_type": "qwen3_moe"})
    sizes = dict.fromkeys(
        "hidden_size num_hidden_layers num_attention_heads intermediate_size vocab_size num_experts "
        "moe_intermediate_size num_experts_per_tok".split(),
        8,
    )
    family.require_geometry(sizes)
    for key in sizes:
        with pytest.raises(JobError) as caught:
            family.require_geometry({**sizes, key: None})
        assert caught.value.key == f"model.config.{key}"
    with pytest.raises(JobError, match="did you mean hidden_size"):
        family.complete({"hiden_size": 8})
