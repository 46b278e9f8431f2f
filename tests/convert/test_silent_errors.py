"""What would give other weights, or a verdict of "equal", without a word: each is noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swift_dist.convert import verify
from swift_dist.convert.hf_to_megatron import HFToMegatronOptions
from swift_dist.convert.hf_to_megatron import run as to_megatron
from swift_dist.convert.megatron_to_hf import MegatronToHFOptions
from swift_dist.convert.megatron_to_hf import run as to_hf
from swift_dist.convert.reshard import ReshardOptions
from swift_dist.convert.reshard import run as reshard
from swift_dist.convert.sources import open_source
from swift_dist.errors import JobError
from tests.converters import tiny_models
from tests.support.dist_tensors import dist_tensors


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model by name, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "model"
            tiny_models.save_tiny_model(name, made[name])
        return made[name]

    return get


def megatron(source: Path, target: Path, **options: Any) -> dict[str, Any]:
    return to_megatron(HFToMegatronOptions(source=str(source), target=str(target), workers=1, **options))


def compare(a: Path, b: Path, **options: Any) -> dict[str, Any]:
    return verify.run(verify.VerifyOptions(a=str(a), b=str(b), workers=1, logits="never", **options))


def configured(source: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def retensored(source: Path, folder: Path, change: Any) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("name", "change"), [("mistral", {"sliding_window": None}), ("deepseek_v3", {"n_group": 1})])
def test_a_setting_that_only_one_side_has_is_a_difference(models: Any, tmp_path: Path, name: str, change: Any) -> None:
    here, there = models(name), configured(models(name), tmp_path / "other", **change)
    assert not compare(here, there)["equal"] and not compare(there, here)["equal"]


def stacked(folder: Path, target: Path) -> None:
    """The checkpoint with all layers of a tensor in one (homogeneous keys)."""
    import torch.distributed.checkpoint as dcp

    found: dict[str, dict[int, torch.Tensor]] = {}
    state = {}
    for key, values in dist_tensors(folder).items():
        parts = key.split(".")
        if parts[1] == "layers":
            found.setdefault(".".join(parts[:2] + parts[3:]), {})[int(parts[2])] = values
        else:
            state[key] = values
    state |= {key: torch.stack([layers[i] for i in range(len(layers))]) for key, layers in found.items()}
    dcp.save(state, checkpoint_id=str(target), no_dist=True)


def test_layers_that_the_config_does_not_name_are_not_dropped(models: Any, tmp_path: Path) -> None:
    megatron(models("llama"), tmp_path / "dist")
    stacked(tmp_path / "dist", tmp_path / "stacked")
    assert compare(models("llama"), tmp_path / "stacked")["equal"]
    fewer = configured(models("llama"), tmp_path / "fewer", num_hidden_layers=2)
    with pytest.raises(JobError, match=r"of which the model of its config has"):
        to_hf(MegatronToHFOptions(source=str(tmp_path / "stacked"), target=str(tmp_path / "out"), hf_config=str(fewer)))
    assert not (tmp_path / "out").exists()


def test_vocabulary_rows_that_are_no_padding_are_not_dropped(models: Any, tmp_path: Path) -> None:
    megatron(models("llama"), tmp_path / "dist")
    smaller = configured(models("llama"), tmp_path / "smaller", vocab_size=50)
    options = {"source": str(tmp_path / "dist"), "target": str(tmp_path / "out"), "hf_config": str(smaller)}
    with pytest.raises(JobError, match=r"61 rows, which is no padded vocabulary"):
        to_hf(MegatronToHFOptions(**options))


def test_what_is_no_tensor_in_a_bin_file_is_named(models: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    state: dict[str, Any] = {name: torch.nn.Parameter(values) for name, values in tensors.items()}
    for parameter in state.values():
        parameter.tensor_model_parallel = True  # torch then pickles it with its attributes
    torch.save(state, folder / "pytorch_model.bin")
    megatron(folder, tmp_path / "dist")
    assert compare(models("llama"), tmp_path / "dist")["equal"]
    torch.save({**state, "model.extra": torch.nn.Linear(2, 2)}, folder / "pytorch_model.bin")
    with pytest.raises(JobError, match=r"model\.extra is a torch\.nn\.modules\.linear\.Linear"):
        megatron(folder, tmp_path / "other")


def quantised(source: Path, folder: Path, block: int) -> Path:
    """The model with fp8 projections of 3 x 3 blocks and factors that differ from block to block."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "_proj" in name]:
            blocks = [-(-extent // block) for extent in tensors[name].shape]
            tensors[f"{name}_scale_inv"] = torch.rand(blocks) + 0.5
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    retensored(source, folder, change)
    settings = {"quant_method": "fp8", "weight_block_size": [block, block]}
    return configured(folder, folder.with_name(f"{folder.name}_stated"), quantization_config=settings)


def test_blocks_are_those_that_the_folder_itself_states(models: Any, tmp_path: Path) -> None:
    folder = quantised(models("llama"), tmp_path / "fp8", 11)
    megatron(folder, tmp_path / "right")
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    values = load_file(folder / "model.safetensors")
    stored, factors = (values[f"model.layers.0.self_attn.o_proj.weight{end}"] for end in ("", "_scale_inv"))
    spread = factors.repeat_interleave(11, 0).repeat_interleave(11, 1)[: stored.shape[0], : stored.shape[1]]
    assert torch.equal(dist_tensors(tmp_path / "right")[name], (stored.float() * spread).bfloat16())
    # The same sizes would fit blocks of 12: a config from elsewhere must not decide.
    plain = configured(models("llama"), tmp_path / "plain", quantization_config={"weight_block_size": [12, 12]})
    megatron(folder, tmp_path / "same", hf_config=str(plain))
    assert compare(tmp_path / "right", tmp_path / "same")["equal"]
    with pytest.raises(JobError, match="should state their blocks"):
        megatron(tmp_path / "fp8", tmp_path / "none")


def test_a_tolerance_is_of_the_stored_values(models: Any, tmp_path: Path) -> None:
    megatron(models("llama"), tmp_path / "bf16", dtype="bf16")
    for pair in ((models("llama"), tmp_path / "bf16"), (tmp_path / "bf16", models("llama"))):
        assert not compare(*pair, tolerance=1e-6)["equal"]
        assert compare(*pair, tolerance=1e-2)["equal"]


def test_a_third_dtype_is_a_difference(models: Any, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].bfloat16() if "layers.1.mlp.down" not in name else tensors[name].half()

    verdict = compare(models("llama"), retensored(models("llama"), tmp_path / "mixed", change), dtype="bf16")
    assert verdict["problems"] == ["model.layers.1.mlp.down_proj.weight: F16 against F32"]


def test_all_differences_of_a_tensor_are_counted(models: Any, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for expert in range(4):
            tensors[f"model.layers.0.mlp.experts.{expert}.down_proj.weight"] += 10.0**-expert

    megatron(models("qwen3_moe"), tmp_path / "dist")
    folder = retensored(models("qwen3_moe"), tmp_path / "changed", change)
    (problem,) = compare(folder, tmp_path / "dist")["problems"]
    assert "3072 values differ, by up to 1" in problem


def test_the_arguments_of_a_legacy_checkpoint_count(models: Any, tmp_path: Path) -> None:
    import argparse

    megatron(models("llama"), tmp_path / "dist")
    reshard(ReshardOptions(source=str(tmp_path / "dist"), target=str(tmp_path / "legacy"), tp=1))
    assert compare(models("llama"), tmp_path / "legacy")["equal"]
    (file,) = (tmp_path / "legacy").rglob("*.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(file, weights_only=True)
    content["args"].norm_epsilon = 0.1
    torch.save(content, file)
    shutil.rmtree(tmp_path / "legacy" / "hf")
    verdict = compare(models("llama"), tmp_path / "legacy")
    assert not verdict["equal"] and "0.1 by the arguments" in verdict["problems"][0]


def test_which_checkpoint_is_meant(models: Any, tmp_path: Path) -> None:
    """A tracker that names nothing is an error; a folder's own weights come before those of folders in it."""
    megatron(models("llama"), tmp_path / "run" / "iter_0000050")
    assert open_source(str(tmp_path / "run")).path.name == "iter_0000050"
    for name in ("100", "x y", ""):
        (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text(name)
        with pytest.raises(JobError, match="there is no such checkpoint"):
            open_source(str(tmp_path / "run"))
    shutil.copytree(models("llama"), tmp_path / "both")
    shutil.copytree(tmp_path / "run" / "iter_0000050", tmp_path / "both" / "step_1")
    assert open_source(str(tmp_path / "both")).kind == "hf"
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "both" / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(tmp_path / "both" / "model.safetensors", tmp_path / "both" / "model-00001-of-00001.safetensors")
    with pytest.raises(JobError, match="which is the model"):
        open_source(str(tmp_path / "both"))


def test_the_report_has_the_hash_of_everything_that_was_read(models: Any, tmp_path: Path) -> None:
    folder = quantised(models("llama"), tmp_path / "fp8", 16)
    megatron(folder, tmp_path / "dist")
    report = json.loads((tmp_path / "dist" / "conversion_report.json").read_text())
    assert report["source_hashes"].keys() == load_file(folder / "model.safetensors").keys()
    assert all(hashes for hashes in report["target_hashes"].values())


def test_leftovers_of_an_interrupted_run_are_not_published(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from swift_dist.converters.target_folder import TargetFolder

    source = tmp_path / "source"
    shutil.copytree(models("llama"), source)
    (source / "chat_template.jinja").write_text("old")
    with monkeypatch.context() as patch:

        def fail(*_: Any) -> None:
            raise OSError("the machine goes down")

        patch.setattr(TargetFolder, "publish", fail)
        with pytest.raises(Exception, match="goes down"):
            megatron(source, tmp_path / "out")
    (source / "chat_template.jinja").unlink()
    assert megatron(source, tmp_path / "out")["resumed_files"] == 1
    assert not (tmp_path / "out" / "hf" / "chat_template.jinja").exists()
    assert not list((tmp_path / "out").glob(".[lpw]*"))
