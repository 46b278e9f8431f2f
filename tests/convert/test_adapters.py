"""LoRA adapters that PEFT trained, to Megatron and back; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from swift_dist.convert import inspect, verify
from swift_dist.convert.sources import open_source
from swift_dist.converters.dist_index import dist_index
from swift_dist.converters.mapping import Experts, hf_shapes
from swift_dist.converters.reading import Reader, as_torch
from swift_dist.errors import JobError
from tests.convert.lora_cases import (
    PLAIN,
    SETTINGS,
    TOKENS,
    Q,
    Trained,
    adapted,
    fused,
    read_all,
    require_equal,
    to_hf,
    to_megatron,
    trainer,
    write_adapter,
)
from tests.converters import tiny_models


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trainer(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("name", SETTINGS)
def test_an_adapter_goes_to_megatron_and_back_bit_for_bit(trained: Trained, tmp_path: Path, name: str) -> None:
    made = trained(name)
    result = to_megatron(made.adapter, tmp_path / "megatron", verify=True, max_shard_size="4KB")
    assert result["verified"]["equal"] and len(result["files"]) > 1
    assert result["parameters"] == sum(values.numel() for values in made.tensors.values())
    assert to_hf(tmp_path / "megatron", tmp_path / "hf", verify=True)["verified"]["equal"]
    require_equal(load_file(tmp_path / "hf" / "adapter_model.safetensors"), made.tensors)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "hf", made.adapter)]
    assert configs[0] == configs[1]
    assert torch.equal(adapted(made.base, tmp_path / "hf"), made.logits)


def test_megatron_names_and_shapes_are_those_of_its_canonical_adapters(trained: Trained, tmp_path: Path) -> None:
    made = trained("llama")
    to_megatron(made.adapter, tmp_path / "megatron", base=str(made.base))
    found = {name: stored.shape for name, stored in dist_index(tmp_path / "megatron").items()}
    attention, mlp = "decoder.layers.2.self_attention.", "decoder.layers.2.mlp."
    assert {name: shape for name, shape in found.items() if ".2." in name or "output" in name} == {
        f"{attention}linear_qkv.adapter.adapter_q.linear_in.weight": (4, 32),
        f"{attention}linear_qkv.adapter.adapter_q.linear_out.weight": (32, 4),
        f"{attention}linear_qkv.adapter.adapter_k.linear_in.weight": (4, 32),
        f"{attention}linear_qkv.adapter.adapter_k.linear_out.weight": (16, 4),
        f"{attention}linear_qkv.adapter.adapter_v.linear_in.weight": (4, 32),
        f"{attention}linear_qkv.adapter.adapter_v.linear_out.weight": (16, 4),
        f"{attention}linear_proj.adapter.linear_in.weight": (4, 32),
        f"{attention}linear_proj.adapter.linear_out.weight": (32, 4),
        f"{mlp}linear_fc1.adapter.adapter_gate.linear_in.weight": (4, 32),
        f"{mlp}linear_fc1.adapter.adapter_gate.linear_out.weight": (48, 4),
        f"{mlp}linear_fc1.adapter.adapter_up.linear_in.weight": (4, 32),
        f"{mlp}linear_fc1.adapter.adapter_up.linear_out.weight": (48, 4),
        f"{mlp}linear_fc2.adapter.linear_in.weight": (4, 48),
        f"{mlp}linear_fc2.adapter.linear_out.weight": (32, 4),
        "output_layer.adapter.linear_in.weight": (4, 32),
        "output_layer.adapter.linear_out.weight": (61, 4),
    }
    assert len(found) == 3 * 14 + 2
    values = as_torch(Reader().read(dist_index(tmp_path / "megatron")[f"{mlp}linear_fc2.adapter.linear_in.weight"]))
    assert torch.equal(values, made.tensors["base_model.model.model.layers.2.mlp.down_proj.lora_A.weight"])
    assert json.loads((tmp_path / "megatron" / "hf" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_fused_adapters_become_one_for_each_projection(trained: Trained, tmp_path: Path, name: str) -> None:
    made = trained(name)
    wanted = fused(made, tmp_path / "fused")
    assert to_hf(tmp_path / "fused", tmp_path / "hf", verify=True)["verified"]["equal"]
    require_equal(load_file(tmp_path / "hf" / "adapter_model.safetensors"), wanted)
    config = json.loads((tmp_path / "hf" / "adapter_config.json").read_text())
    modules = {key.partition(".lora_")[0].removeprefix("base_model.model.") for key in wanted}
    assert set(config["target_modules"]) == modules
    to_hf(made.base, tmp_path / "merged", adapter=str(tmp_path / "fused"), verify=True)
    ours, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", made.base))
    for key, values in base.items():
        a, b = (wanted.get(f"base_model.model.{key.removesuffix('.weight')}.lora_{side}.weight") for side in "AB")
        theirs = values if a is None else values + b @ a * (2 / 4)
        assert (ours[key] - theirs).abs().max() <= 1e-6 * theirs.abs().max(), key
    if name == "llama":  # PEFT 0.21 takes gate_proj of a mixture for its experts, of a dense layer too
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made.base), tmp_path / "hf")
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(TOKENS).logits
            assert torch.allclose(model(TOKENS).logits, logits, atol=1e-4)
    a, b = str(tmp_path / "hf"), str(tmp_path / "fused")
    options = {"hf_config": str(made.base), "workers": 1}
    for pair in ({"a": a, "b": b}, {"a": b, "b": a}):
        assert verify.run(verify.VerifyOptions(**pair, **options))["equal"]
    tensors = {key: values + ("k_proj.lora_A" in key) for key, values in wanted.items()}
    save_file(tensors, tmp_path / "hf" / "adapter_model.safetensors")
    for pair in ({"a": a, "b": b}, {"a": b, "b": a}):
        assert not verify.run(verify.VerifyOptions(**pair, **options))["equal"]


def test_adapters_of_experts_are_stored_as_experts_are(tmp_path: Path) -> None:
    """transformers 4 has a projection for each expert; its adapters are read though transformers 5 makes none."""
    tiny_models.save_tiny_model("qwen3_moe", tmp_path / "base")
    rows = open_source(str(tmp_path / "base")).rows
    tensors = {}
    for name, (out, inner) in hf_shapes(row for row in rows if isinstance(row, Experts)).items():
        peft = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{peft}.lora_A.weight": torch.randn(2, inner), f"{peft}.lora_B.weight": torch.randn(out, 2)}
    write_adapter(tmp_path / "adapter", tensors, tmp_path / "base")
    to_megatron(tmp_path / "adapter", tmp_path / "megatron", verify=True)
    found = read_all(tmp_path / "megatron")
    gate = "base_model.model.model.layers.0.mlp.experts.{}.gate_proj.lora_B.weight"
    key = "decoder.layers.0.mlp.experts.experts.linear_fc1.adapter.adapter_gate.linear_out.weight"
    assert torch.equal(found[key], torch.stack([tensors[gate.format(expert)] for expert in range(4)]))
    to_hf(tmp_path / "megatron", tmp_path / "hf", verify=True)
    require_equal(load_file(tmp_path / "hf" / "adapter_model.safetensors"), tensors)
    to_hf(tmp_path / "base", tmp_path / "merged", adapter=str(tmp_path / "megatron"), verify=True)
    base, merged = (load_file(tmp_path / side / "model.safetensors") for side in ("base", "merged"))
    weight = "model.layers.2.mlp.experts.3.down_proj"
    a, b = (tensors[f"base_model.model.{weight}.lora_{side}.weight"] for side in "AB")
    assert torch.allclose(merged[f"{weight}.weight"], base[f"{weight}.weight"] + b @ a * 2, atol=1e-6)
    for name in list(tensors):
        if ".0.mlp.experts.1.up_proj." in name:
            del tensors[name]
    write_adapter(tmp_path / "partial", tensors, tmp_path / "base")
    with pytest.raises(JobError, match=r"experts of model\.layers\.0\..*have adapters of ranks \[0, 2\]"):
        to_megatron(tmp_path / "partial", tmp_path / "other")


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"use_dora": True}, {}, "use_dora True, which is not converted: DoRA"),
        ({"modules_to_save": ["lm_head"]}, {}, r"modules_to_save \['lm_head'\].*whole modules"),
        ({"bias": "all"}, {}, "bias 'all': it trains biases"),
        ({"lora_bias": True}, {}, "lora_bias True.*have biases"),
        ({"fan_in_fan_out": True}, {}, "fan_in_fan_out True.*transposed"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, {}, "target_parameters.*no projections"),
        ({"peft_type": "IA3"}, {}, "peft_type 'IA3' is not converted"),
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights 'pissa', which changes the weights"),
        ({"something_new": 1}, {}, "something_new 1, which is not converted: this version does not know"),
        ({"r": None}, {}, "states no r"),
        ({"r": 4}, {}, r"q_proj has rank 2, adapter_config\.json says 4"),
        (
            {},
            {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 61)},
            "lora_embedding_A adapts an embedding",
        ),
        ({}, {f"{Q}A.weight".replace("q_proj", "x_proj"): torch.ones(2, 32)}, "x_proj.*has no row in this model"),
        ({}, {f"{Q}A.weight".replace(".0.", ".7."): torch.ones(2, 32)}, "has no row in this model"),
        (
            {},
            {"base_model.model.lm_head.base_layer.weight": torch.ones(61, 32)},
            "is a weight of the model itself.*\\n.*save_embedding_layers=False",
        ),
        ({}, {f"{Q}magnitude_vector.weight": torch.ones(32)}, "has no row in this model"),
        ({}, {f"{Q}B.bias": torch.ones(32)}, "has no row in this model"),
        ({}, {f"{Q}B.weight".replace("q_proj", "k_proj"): torch.ones(16, 2)}, "has no row in this model"),
        ({}, {f"{Q}A.weight".replace("q_proj", "k_proj"): torch.ones(2, 32)}, "missing: .*k_proj.lora_B"),
        ({}, {f"{Q}B.weight": torch.ones(31, 2)}, r"q_proj\.lora_B\.weight: shape \[31, 2\]"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(
    trained: Trained, tmp_path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], message: str
) -> None:
    base = trained("llama").base
    write_adapter(tmp_path / "adapter", PLAIN | tensors, base, **config)
    with pytest.raises(JobError, match=message):
        to_megatron(tmp_path / "adapter", tmp_path / "target")
    with pytest.raises(JobError, match=message) as caught:
        to_hf(base, tmp_path / "target", adapter=str(tmp_path / "adapter"))
    assert caught.value.key == "adapter" and not (tmp_path / "target").exists()


def test_wrong_words_are_refused(trained: Trained, tmp_path: Path) -> None:
    made, target = trained("llama"), tmp_path / "target"
    write_adapter(tmp_path / "lost", PLAIN, Path("no/such/model"))
    with pytest.raises(JobError, match=r"hf_config: .*'no/such/model' is no folder here\n.*--base"):
        to_megatron(tmp_path / "lost", target)
    with pytest.raises(JobError, match="is a Hugging Face folder already"):
        to_hf(made.adapter, target)
    with pytest.raises(JobError, match=r"base: .*is a model, not an adapter"):
        to_megatron(made.base, target, base=str(made.base))
    with pytest.raises(JobError, match=r"base: .*both name"):
        to_megatron(made.adapter, target, base=str(made.base), hf_config=str(made.base))
    with pytest.raises(JobError, match=r"adapter: .*is an adapter itself"):
        to_megatron(made.adapter, target, adapter=str(made.adapter))
    with pytest.raises(JobError, match=r"adapter: .*is no adapter"):
        to_megatron(made.base, target, adapter=str(made.base))
    with pytest.raises(JobError, match=r"has no row|shape"):
        to_megatron(made.base, target, adapter=str(trained("qwen3_moe").adapter))
    with pytest.raises(JobError, match="is an adapter"):
        open_source(str(made.adapter), str(made.base))
    to_megatron(made.adapter, tmp_path / "megatron")
    with pytest.raises(JobError, match=r"max_shard_size: .*PEFT reads it from one file"):
        to_hf(tmp_path / "megatron", target, max_shard_size="1KB")
    (tmp_path / "megatron" / "hf" / "adapter_config.json").unlink()
    with pytest.raises(JobError, match=r"no hf/adapter_config\.json, which says how it is scaled"):
        to_hf(tmp_path / "megatron", target)
    (made.adapter / "adapter_model.safetensors").rename(tmp_path / "away")
    with pytest.raises(JobError, match=r"no adapter_model\.safetensors"):
        to_megatron(made.adapter, target)
    (tmp_path / "away").rename(made.adapter / "adapter_model.safetensors")
    assert not target.exists()


def test_a_checkpoint_of_an_adapter_and_weights_is_refused(trained: Trained, tmp_path: Path) -> None:
    made = trained("llama")
    fused(made, tmp_path / "both")
    key = "decoder.layers.0.self_attention.linear_qkv."
    state = {name: values.clone() for name, values in read_all(tmp_path / "both").items()}
    for more, message in (
        ({f"{key}weight": torch.ones(64, 32)}, "an adapter and 1 weights of the model beside it"),
        (
            {f"{key}adapter.adapter_q.linear_in.weight": torch.ones(4, 32)}
            | {f"{key}adapter.adapter_q.linear_out.weight": torch.ones(32, 4)},
            "an adapter twice, fused and not",
        ),
    ):
        dcp.save(state | more, checkpoint_id=str(tmp_path / "both"), no_dist=True)
        with pytest.raises(JobError, match=message):
            to_hf(tmp_path / "both", tmp_path / "target")


def test_bin_files_are_read_and_inspect_knows_adapters(trained: Trained, tmp_path: Path) -> None:
    made = trained("llama")
    write_adapter(tmp_path / "bin", PLAIN, made.base)
    torch.save(PLAIN, tmp_path / "bin" / "adapter_model.bin")
    (tmp_path / "bin" / "adapter_model.safetensors").unlink()
    to_megatron(tmp_path / "bin", tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "hf")
    require_equal(load_file(tmp_path / "hf" / "adapter_model.safetensors"), PLAIN)
    looked = inspect.run(inspect.InspectOptions(source=str(tmp_path / "bin")))
    assert looked["format"] == "peft" and looked["layout"] == {"rank": 2, "alpha": 4} and looked["parameters"] == 128


def test_another_scaling_is_a_difference(trained: Trained, tmp_path: Path) -> None:
    made = trained("llama")
    for name, alpha in (("a", 4), ("b", 5)):
        write_adapter(tmp_path / name, PLAIN, made.base, lora_alpha=alpha)
    result = verify.run(verify.VerifyOptions(a=str(tmp_path / "a"), b=str(tmp_path / "b"), workers=1))
    assert result["problems"] == ["model.layers.0.self_attn.q_proj: scaled by 2.5, not 2.0"]


def test_an_adapter_of_another_family_is_refused_and_of_another_folder_told(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = trained("llama")
    tiny_models.save_tiny_model("qwen2", tmp_path / "qwen2")
    write_adapter(tmp_path / "adapter", PLAIN, made.base)
    with pytest.raises(JobError, match=r"adapter: .*was trained on a llama model"):
        to_megatron(tmp_path / "qwen2", tmp_path / "merged", adapter=str(tmp_path / "adapter"))
    write_adapter(tmp_path / "named", PLAIN, Path("meta/other"))
    with caplog.at_level("WARNING"):
        to_megatron(made.base, tmp_path / "merged", adapter=str(tmp_path / "named"))
    assert "names meta/other as its base" in caplog.text
