from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest

from swift_dist.errors import JobError
from swift_dist.models import Family, families, find_family
from swift_dist.models._rope import rope_parameters

FAMILIES = {family.name: family for family in families()}
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
NOT_TRAINED = {"mixtral", "deepseek_v2", "deepseek_v3"}
UNSTATED = {"deepseek_v2": {"num_experts_per_tok": 6}}  # what a config must state: transformers assumes none
# What published files state and transformers 5 does not read any more.
UNREAD = {"ep_size", "moe_layer_freq", "aux_loss_alpha", "seq_aux", "scoring_func"}
NOT_THEIRS = {
    *("layer_types", "router_z_loss_coef", "mlp_only_layers", "num_experts", "rope_theta", "qk_head_dim"),
    "num_nextn_predict_layers",  # transformers assumes 1, and saves folders without it
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
    stated = UNSTATED.get(family.name, {})
    theirs = hf_class(family, **stated).to_dict()
    ours = family.complete(stated)
    unread = UNREAD | ({"topk_method"} if family.name == "deepseek_v3" else set())
    assert not theirs.keys() & (unread if "v_head_dim" in family.defaults else set())
    for key in family.defaults.keys() - NOT_THEIRS - unread:
        if key == "sliding_window" and not theirs.get("use_sliding_window", True):
            continue  # transformers forgets the window where it is switched off
        if key == "head_dim" and theirs.get(key) is None:
            assert ours[key] == theirs["hidden_size"] // theirs["num_attention_heads"]
            continue
        assert ours[key] == theirs[key], key
    if "num_experts" in family.defaults:
        assert ours["num_experts"] == getattr(hf_class(family), "num_experts", None)
    assert rope_parameters(ours) == theirs["rope_parameters"]


def test_what_save_pretrained_writes_is_understood(family: Family) -> None:
    hf = hf_class(family, **TINY, **UNSTATED.get(family.name, {})).to_dict() | {
        "architectures": list(family.architectures)
    }
    assert find_family(hf) is family
    assert family.shape(hf).hidden_size == 32


@pytest.mark.parametrize("keys", [{}, TINY], ids=["defaults", "tiny"])
def test_parameter_count_equals_transformers(family: Family, keys: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    keys = keys | UNSTATED.get(family.name, {})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_class(family, **keys))
    count = sum(parameter.numel() for parameter in model.parameters())
    count += sum(bias.numel() for name, bias in model.named_buffers() if name.endswith("e_score_correction_bias"))
    assert family.shape(keys).num_parameters() == count


def test_arguments_fit_megatron(family: Family) -> None:
    """Every key is an argument there, and the values pass megatron's own checks."""
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    keys = TINY | UNSTATED.get(family.name, {})
    arguments = family.transformer_config(keys)
    config = (MLATransformerConfig if "multi_latent_attention" in arguments else TransformerConfig)(**arguments)
    assert config.kv_channels == family.complete(keys)["head_dim"]
    assert config.gated_linear_unit and config.activation_func.__name__ == "silu"
    assert family.gpt_model(keys).keys() <= inspect.signature(GPTModel.__init__).parameters.keys()


def test_families_that_are_converted_only_are_refused_for_training(family: Family) -> None:
    assert family.trainable == (family.name not in NOT_TRAINED)
    if family.trainable:
        family.require_trainable()
        return
    with pytest.raises(JobError, match="can be converted but is not trained yet") as caught:
        family.require_trainable()
    assert caught.value.key == "model.config.model_type"


def test_a_folder_may_lack_what_its_config_states() -> None:
    """transformers saves DeepSeek-V3 without the multi-token-prediction layers that its config keeps stating."""
    family = FAMILIES["deepseek_v3"]
    hf = {"num_hidden_layers": 4, "num_nextn_predict_layers": 1}
    assert family.for_folder(hf, {"model.layers.3.mlp.up_proj.weight"}) == hf | {"num_nextn_predict_layers": 0}
    for name in ("model.layers.4.enorm.weight", "mtp.layers.0.enorm.weight"):
        assert family.for_folder(hf, {name}) == hf
    renamed = {"num_hidden_layers": 4, "num_mtp_layers": 1}
    assert family.complete(renamed)["num_nextn_predict_layers"] == 1
    assert family.complete(family.for_folder(renamed, ()))["num_nextn_predict_layers"] == 0
    assert FAMILIES["llama"].for_folder({"vocab_size": 5}, ()) == {"vocab_size": 5}


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
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok", "more than num_local_experts 8"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise", "not understood"),
        ("deepseek_v2", {}, "num_experts_per_tok", "positive whole number"),
        ("deepseek_v2", {"num_experts_per_tok": 6, "norm_topk_prob": True}, "norm_topk_prob", "only False"),
        ("deepseek_v2", {"num_experts_per_tok": 6, "mlp_bias": True}, "mlp_bias", "only False"),
        ("deepseek_v2", {"num_experts_per_tok": 6, "topk_method": "noaux_tc"}, "topk_method", "only 'greedy' or"),
        ("deepseek_v3", {"first_k_dense_replace": 4}, "first_k_dense_replace", "no layer with experts"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias", "not supported"),
        ("deepseek_v3", {"q_lora_rank": 0}, "q_lora_rank", "null or positive"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq", "only 1"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func", "only 'sigmoid'"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave", "only True"),
        ("deepseek_v3", {"qk_head_dim": 5}, "qk_head_dim", "192"),
        ("deepseek_v3", {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers", "whole number"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config", "not understood"),
    ],
)
def test_refusals_name_the_key(name: str, keys: dict[str, Any], key: str, says: str) -> None:
    with pytest.raises(JobError) as caught:
        FAMILIES[name].shape(TINY | keys)
    assert caught.value.key == f"model.config.{key}"
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "stated",
    [
        {"type": "linear", "factor": 2.0},
        {"type": "yarn", "factor": 2.0, "attention_factor": 1.5},
        {"type": "yarn", "factor": 2.0, "mscale_all_dim": 1.0},
    ],
)
def test_rope_that_latent_attention_computes_otherwise_is_refused(stated: dict[str, Any]) -> None:
    """Where it would be computed: the weights are the same."""
    hf = TINY | {"rope_scaling": stated}
    assert FAMILIES["deepseek_v3"].rows(hf)
    with pytest.raises(JobError, match="is not what megatron-core's latent attention computes"):
        FAMILIES["deepseek_v3"].transformer_config(hf)


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
