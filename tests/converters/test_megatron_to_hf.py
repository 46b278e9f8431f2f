from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from swift_dist.checkpoint.safe_reader import SafeFileSystemReader
from swift_dist.convert.megatron_to_hf import MegatronToHFOptions, render, run
from swift_dist.converters.dist_index import dist_index
from swift_dist.converters.mapping import checkpoint_key, duplicates, expand
from swift_dist.converters.reading import Reader, as_torch
from swift_dist.converters.safetensors_io import parse_size
from swift_dist.errors import JobError, RunError


def stored(saved: Any, whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the engine's checkpoint holds: padded vocabulary, experts of a layer in one tensor, optimizer state."""
    found: dict[str, Any] = {"optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.zeros(32)}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for tensor in expand(saved.rows):
        key, expert = checkpoint_key(tensor.name)
        values = whole[tensor.name]
        if tensor.padded:
            values = torch.cat([values, torch.full((128 - len(values), values.shape[1]), 7.0)])
        if expert is not None:
            experts.setdefault(key, {})[expert] = values
        elif not tensor.tied_copy:
            found[key] = values
    return found | {key: torch.stack([each[i] for i in range(len(each))]) for key, each in experts.items()}


@pytest.fixture
def run_folder(saved: Any, whole: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """A run folder with two steps; the newer holds the model."""
    state = stored(saved, whole)
    for step in (9, 10):
        folder = tmp_path / "run" / "checkpoints" / f"step_{step}"
        weights = state if step == 10 else {key: value + 1 for key, value in state.items()}
        dcp.save(weights, checkpoint_id=str(folder), no_dist=True)
    model = {"path": None, "config": saved.hf, "tokenizer": None}
    (tmp_path / "run" / "job.yaml").write_text(yaml.safe_dump({"task": "pretrain", "model": model}))
    return tmp_path / "run"


def convert(source: Path, target: Path, **options: Any) -> dict[str, Any]:
    return run(MegatronToHFOptions(source=str(source), target=str(target), **options))


def test_export_is_bit_exact_and_transformers_loads_it(saved: Any, run_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    result = convert(run_folder, tmp_path / "hf")
    repeated = {row.hf for row in duplicates(saved.rows)}
    assert result["parameters"] == sum(v.numel() for name, v in saved.tensors.items() if name not in repeated)
    assert result["ignored_tensors"] == 1 and result["dtype"] == "fp32" and not result["dry_run"]
    assert "step_10" in result["source"] and str(tmp_path / "hf") in render(result)
    got, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    beyond = f"model.layers.{saved.hf['num_hidden_layers']}."  # transformers has no layers for prediction
    assert not any(name for names in info.values() for name in names if not str(name).startswith(beyond)), info
    original = AutoModelForCausalLM.from_pretrained(saved.folder)
    for (name, ours), (_, theirs) in zip(got.named_parameters(), original.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    tokens = torch.arange(20)[None] % 61
    assert torch.equal(got(tokens).logits, original(tokens).logits)


def test_sharded_export_has_an_index_and_no_file_above_the_limit(run_folder: Path, tmp_path: Path, saved: Any) -> None:
    from transformers import AutoModelForCausalLM

    result = convert(run_folder / "checkpoints", tmp_path / "hf", max_shard_size="16KiB")
    assert len(result["files"]) > 2
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(result["files"])
    assert index["metadata"]["total_size"] == result["bytes"]
    assert all((tmp_path / "hf" / file).stat().st_size < 16384 + 4096 for file in result["files"])
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    original = AutoModelForCausalLM.from_pretrained(saved.folder).state_dict()
    assert all(torch.equal(got[name], original[name]) for name in original)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_dtype(run_folder: Path, tmp_path: Path, saved: Any, name: Any, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file

    convert(run_folder / "checkpoints" / "step_10", tmp_path / "hf", dtype=name)
    got = load_file(tmp_path / "hf" / "model.safetensors")
    for key, values in saved.tensors.items():
        kept = key.endswith("e_score_correction_bias")  # the router computes with it in fp32
        assert torch.equal(got[key], values if kept else values.to(dtype)), key
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_dry_run_writes_nothing(run_folder: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = convert(run_folder, tmp_path / "hf", dry_run=True)
    assert result["dry_run"] and result["bytes"] > 0 and "would write" in render(result)
    assert sorted(tmp_path.rglob("*")) == before


def test_tokenizer_and_generation_config_travel(run_folder: Path, tmp_path: Path, saved: Any) -> None:
    from tokenizers import Tokenizer, models

    tokenizer = tmp_path / "tok"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "modeling_other.py", "README.md"):
        (tokenizer / name).write_text("{}")
    Tokenizer(models.WordLevel({"a": 0}, "a")).save(str(tokenizer / "tokenizer.json"))
    (saved.folder / "generation_config.json").write_text('{"temperature": 0.5}')
    model = {"path": str(saved.folder), "config": None, "tokenizer": str(tokenizer)}
    (run_folder / "job.yaml").write_text(yaml.safe_dump({"model": model}))
    result = convert(run_folder, tmp_path / "hf")
    expected = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert result["other_files"] == expected
    report = ["conversion_report.json", "conversion_report.md"]
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == sorted([*expected, *report, *result["files"]])


def test_checkpoint_that_knows_its_model_needs_nothing_else(run_folder: Path, tmp_path: Path, saved: Any) -> None:
    step = run_folder / "checkpoints" / "step_10"
    files = {path.name: {"bytes": path.stat().st_size} for path in step.iterdir()}
    record = {"format": 1, "step": 10, "metadata": {"hf_config": saved.hf}, "files": files}
    (step / "swift_dist.json").write_text(json.dumps(record))
    (run_folder / "job.yaml").unlink()
    assert convert(step, tmp_path / "hf")["step"] == 10


def refusal(source: Path, target: Path, **options: Any) -> JobError:
    with pytest.raises(JobError) as caught:
        convert(source, target, **options)
    assert not target.exists() or target.is_file() or (target / "mine").exists()
    return caught.value


def test_wrong_sources_are_refused_before_anything_is_written(run_folder: Path, tmp_path: Path, saved: Any) -> None:
    target, step = tmp_path / "hf", run_folder / "checkpoints" / "step_10"
    assert "is not a folder" in str(refusal(tmp_path / "absent", target))
    assert "is a Hugging Face folder already" in str(refusal(saved.folder, target))
    assert "neither Hugging Face weights nor" in str(refusal(tmp_path, target))
    (run_folder / "job.yaml").unlink()
    assert "--hf_config" in str(refusal(run_folder, target))
    assert "cannot be read" in str(refusal(run_folder, target, hf_config=str(tmp_path)))
    other = tmp_path / "other.json"
    hf = {key: value for key, value in saved.hf.items() if key != "layer_types"}
    other.write_text(json.dumps(hf | {"num_hidden_layers": 4}))
    message = str(refusal(run_folder, target, hf_config=str(other)))
    assert "missing: decoder.layers.3" in message
    other.write_text(json.dumps(hf | {"num_hidden_layers": 2}))
    assert "mapped by no row: decoder.layers.2" in str(refusal(run_folder, target, hf_config=str(other)))
    other.write_text(json.dumps({"model_type": "gpt2"}))
    assert "'gpt2' is not supported" in str(refusal(run_folder, target, hf_config=str(other)))
    other.write_text(json.dumps(saved.hf))
    size = (step / ".metadata").stat().st_size
    os.truncate(step / ".metadata", size // 2)
    assert ".metadata cannot be read" in str(refusal(run_folder, target, hf_config=str(other)))


def test_wrong_targets_and_options_are_refused(run_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "hf"
    target.mkdir()
    (target / "mine").write_text("keep")
    assert refusal(run_folder, target).key == "target"
    assert (target / "mine").read_text() == "keep"
    assert refusal(run_folder, tmp_path / "run" / "job.yaml").key == "target"
    for size in ("huge", "0GB", "-1GB", "5XB"):
        assert refusal(run_folder, tmp_path / "new", max_shard_size=size).key == "max_shard_size"
    assert refusal(run_folder, tmp_path / "new", tokenizer=str(tmp_path / "absent")).key == "tokenizer"


def test_sizes() -> None:
    assert [parse_size(text) for text in ("5GB", "5GiB", "512MiB", "1.5kB", "100")] == [
        5_000_000_000,
        5 * 2**30,
        512 * 2**20,
        1500,
        100,
    ]


def test_a_checkpoint_that_breaks_off_leaves_nothing_behind(run_folder: Path, tmp_path: Path) -> None:
    for file in (run_folder / "checkpoints" / "step_10").glob("*.distcp"):
        os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(JobError, match=r"\.distcp has \d+ bytes; .* would end at byte"):
        convert(run_folder, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_recorded_file_of_another_size_is_refused(run_folder: Path, tmp_path: Path) -> None:
    step = run_folder / "checkpoints" / "step_10"
    record = {"format": 1, "step": 10, "metadata": {}, "files": {"__0_0.distcp": {"bytes": 3}}}
    (step / "swift_dist.json").write_text(json.dumps(record))
    assert "not whole (3 bytes" in str(refusal(run_folder, tmp_path / "hf"))


def test_values_beyond_float16_are_refused(
    run_folder: Path, tmp_path: Path, saved: Any, whole: dict[str, torch.Tensor]
) -> None:
    state = stored(saved, whole)
    state["decoder.final_layernorm.weight"][3] = 1e6
    step = run_folder / "checkpoints" / "step_11"
    dcp.save(state, checkpoint_id=str(step), no_dist=True)
    with pytest.raises(RunError, match=r"model\.norm\.weight has values beyond float16"):
        convert(step, tmp_path / "hf", dtype="fp16")
    assert not (tmp_path / "hf").exists()
    convert(step, tmp_path / "hf", dtype="bf16")


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.marker}",))


def test_index_cannot_run_code(tmp_path: Path) -> None:
    marker = tmp_path / "was_here"
    for content in (Evil(marker), {"planner_data": Evil(marker)}, [torch.nn.Linear]):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(content))
        with pytest.raises(pickle.UnpicklingError, match="does not belong"):
            SafeFileSystemReader(tmp_path).read_metadata()
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(pickle.UnpicklingError, match="holds a dict"):
        SafeFileSystemReader(tmp_path).read_metadata()
    assert not marker.exists()


def test_parts_of_tensors_are_read(tmp_path: Path) -> None:
    values = torch.arange(60.0).reshape(5, 12)
    dcp.save({"a": values.bfloat16(), "n": torch.tensor(3)}, checkpoint_id=str(tmp_path), no_dist=True)
    found, reader = dist_index(tmp_path), Reader()
    assert found["a"].shape == (5, 12) and found["a"].dtype == "BF16"
    assert torch.equal(as_torch(reader.read(found["a"], ((1, 3), (5, 7)))), values[1:3, 5:7].bfloat16())
    assert torch.equal(as_torch(reader.read(found["n"])), torch.tensor(3))
    assert sorted(found) == ["a", "n"]


def test_the_export_states_the_end_of_text_of_its_tokenizer(run_folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, GenerationConfig

    job = yaml.safe_load((run_folder / "job.yaml").read_text())
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        job["model"]["config"] = {k: v for k, v in job["model"]["config"].items() if k != key}
    (run_folder / "job.yaml").write_text(yaml.safe_dump(job))
    tokenizer = tmp_path / "tok"
    tokenizer.mkdir()
    Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "<end>": 3}, "a")).save(str(tokenizer / "tokenizer.json"))
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    for words, eos in (({}, None), ({"tokenizer": str(tokenizer)}, 3)):
        target = tmp_path / f"hf{eos}"
        convert(run_folder, target, **words)
        for loaded in (AutoConfig.from_pretrained(target), GenerationConfig.from_pretrained(target)):
            assert loaded.eos_token_id == eos and loaded.bos_token_id is None
    (tokenizer / "tokenizer.json").write_text('{"broken')
    with pytest.raises(JobError, match=r"tokenizer\.json cannot be read"):
        convert(run_folder, tmp_path / "other", tokenizer=str(tokenizer))
    assert not (tmp_path / "other").exists()
