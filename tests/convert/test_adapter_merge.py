"""LoRA adapters merged into weights; what PEFT merges is the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from swift_dist.convert import conversion, reshard, verify
from swift_dist.converters.copying import low_rank
from swift_dist.converters.plan import Copy, Delta, Region
from swift_dist.converters.reading import Reader
from swift_dist.converters.safetensors_io import read_safetensors
from swift_dist.converters.stored import Extent, StoredTensor
from swift_dist.errors import JobError
from tests.convert.lora_cases import PLAIN, SETTINGS, TOKENS, Trained, to_hf, to_megatron, trainer, write_adapter


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trainer(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("name", SETTINGS)
def test_merged_weights_are_those_that_peft_merges(trained: Trained, tmp_path: Path, name: str) -> None:
    """Within 1e-6 of the largest weight of a tensor: the order of a product's sums is the library's business."""
    made = trained(name)
    result = to_hf(made.base, tmp_path / "hf", adapter=str(made.adapter), verify=True)
    assert result["verified"]["equal"] and result["adapter"] == str(made.adapter)
    assert result["verified"]["logits_skipped"]
    got = load_file(tmp_path / "hf" / "model.safetensors")
    assert got.keys() == made.merged.keys()
    for key, values in made.merged.items():
        assert (got[key] - values).abs().max() <= 1e-6 * values.abs().max(), key
    untouched = [key for key in got if torch.equal(got[key], load_file(made.base / "model.safetensors")[key])]
    adapted_names = {key.partition(".lora_")[0].removeprefix("base_model.model.") for key in made.tensors}
    assert {f"{key}.weight" for key in adapted_names} == got.keys() - set(untouched)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(TOKENS).logits
    assert (logits - made.logits).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_every_way_to_merged_weights_gives_the_same_bits(trained: Trained, tmp_path: Path, name: str) -> None:
    """From each format of the model, with either format of the adapter, into either format."""
    made = trained(name)
    to_megatron(made.base, tmp_path / "base")
    to_megatron(made.adapter, tmp_path / "adapter")
    to_hf(made.base, tmp_path / "one", adapter=str(made.adapter))
    to_hf(tmp_path / "base", tmp_path / "two", adapter=str(tmp_path / "adapter"), max_shard_size="20KB", verify=True)
    merged = to_megatron(made.base, tmp_path / "three", adapter=str(tmp_path / "adapter"), verify=True)
    assert merged["verified"]["equal"]
    reshard.run(reshard.ReshardOptions(source=str(tmp_path / "base"), target=str(tmp_path / "legacy"), tp=2, workers=1))
    to_hf(tmp_path / "legacy", tmp_path / "four", adapter=str(made.adapter), verify=True)
    for other in ("two", "three", "four"):
        options = verify.VerifyOptions(a=str(tmp_path / "one"), b=str(tmp_path / other), workers=1, logits="never")
        assert verify.run(options)["equal"]
    options = verify.VerifyOptions(a=str(made.base), b=str(tmp_path / "three"), workers=1, logits="never")
    assert not verify.run(options)["equal"]


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_bf16_weights_are_merged_as_peft_merges_them(trained: Trained, tmp_path: Path, adapter_dtype: Any) -> None:
    """One unit in the last place of a few elements: where the sum is within the product's rounding of a tie."""
    made = trained("llama")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.bfloat16).save_pretrained(base)
    adapter.mkdir()
    tensors = {name: values.to(adapter_dtype) for name, values in made.tensors.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text((made.adapter / "adapter_config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(tmp_path / "theirs")
    to_hf(base, tmp_path / "ours", adapter=str(adapter))
    ours, theirs = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs"))
    steps = [(ours[key].view(torch.int16).int() - theirs[key].view(torch.int16).int()).abs() for key in theirs]
    assert max(int(step.max()) for step in steps) <= 1
    assert sum(int(step.sum()) for step in steps) <= 1e-3 * sum(step.numel() for step in steps)
    assert {values.dtype for values in ours.values()} == {torch.bfloat16}


def test_how_a_matrix_is_cut_does_not_show_in_what_is_added(tmp_path: Path) -> None:
    """Any part of ``b @ a * scaling`` has the bits that it has in the whole, on the grid's edges too."""
    out, inner, rank = 300, 4500, 19
    torch.manual_seed(0)
    matrices = {"b": torch.randn(out, rank), "a": torch.randn(rank, inner)}
    save_file(matrices, tmp_path / "ab.safetensors")
    regions = {}
    for name, stored in read_safetensors(tmp_path / "ab.safetensors").items():
        virtual = StoredTensor(name, stored.shape, "F32", (Extent("", 0, stored.whole),))
        regions[name] = Region(virtual, (Copy(stored.whole, stored, stored.whole),))
    delta, reader = Delta(regions["b"], regions["a"], 0.3, ((0, out), (0, inner))), Reader()
    whole = low_rank(delta, delta.box, reader)
    reference = (matrices["b"] @ matrices["a"] * 0.3).numpy()
    assert abs(whole - reference).max() <= 1e-6 * abs(reference).max()
    for rows in ((0, 1), (127, 129), (5, 290), (299, 300)):
        for columns in ((0, 4500), (2047, 2049), (4499, 4500), (100, 101)):
            part = low_rank(delta, (rows, columns), reader)
            assert (part == whole[slice(*rows), slice(*columns)]).all()


def test_an_interrupted_merge_does_not_go_on_with_another_scaling(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trained("llama")
    for name, alpha in (("a", 4), ("b", 5)):
        write_adapter(tmp_path / name, PLAIN, made.base, lora_alpha=alpha)
    (tmp_path / "b" / "adapter_model.safetensors").unlink()
    (tmp_path / "b" / "adapter_model.safetensors").hardlink_to(tmp_path / "a" / "adapter_model.safetensors")

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(conversion, "write_report", fail)
        with pytest.raises(KeyboardInterrupt):
            to_hf(made.base, tmp_path / "hf", adapter=str(tmp_path / "a"))
    with pytest.raises(JobError, match="interrupted conversion that differs in adapter"):
        to_hf(made.base, tmp_path / "hf", adapter=str(tmp_path / "b"))
    assert to_hf(made.base, tmp_path / "hf", adapter=str(tmp_path / "a"))["resumed_files"] == 1
