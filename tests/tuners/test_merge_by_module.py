"""Merging with one module in memory: every bit is that of PEFT's merge_and_unload of the whole model in fp32."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel

from swift_dist.converters.safetensors_io import HFFolder
from swift_dist.errors import JobError, RunError
from swift_dist.tuners import _stored, merge
from tests.tuners.tiny import load, tiny_folder

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
PATTERNS = {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 5}}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("llama", "LoraConfig", {"target_modules": [*ATTENTION, *MLP, "lm_head"]}),
    "rslora": ("llama", "LoraConfig", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, **PATTERNS}),
    "dora": ("llama", "LoraConfig", {"target_modules": [*ATTENTION, *MLP], "use_dora": True}),
    "embedding": ("llama", "LoraConfig", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied": ("qwen2", "LoraConfig", {"target_modules": ATTENTION}),
    "biases": ("qwen2", "LoraConfig", {"target_modules": ["q_proj"], "bias": "all"}),
    "own biases": ("qwen2", "LoraConfig", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "lora_bias": ("qwen2", "LoraConfig", {"target_modules": ["q_proj"], "lora_bias": True}),
    "modules": ("llama", "LoraConfig", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]}),
    "tokens": ("llama", "LoraConfig", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}),
    "head": ("classifier", "LoraConfig", {"target_modules": ["v_proj"], "task_type": "SEQ_CLS"}),
    "transposed": ("gpt2", "LoraConfig", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "experts": (
        "mixtral",
        "LoraConfig",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "attention of experts": ("mixtral", "LoraConfig", {"target_modules": ATTENTION}),
    "adalora": ("llama", "AdaLoraConfig", {"target_modules": ATTENTION, "init_r": 4, "total_step": 10}),
    "ia3": ("llama", "IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "loha": ("llama", "LoHaConfig", {"target_modules": ATTENTION}),
    "lokr": ("llama", "LoKrConfig", {"target_modules": ATTENTION}),
    "oft": ("llama", "OFTConfig", {"target_modules": ["q_proj"], "oft_block_size": 4, "r": 0}),
    "boft": ("llama", "BOFTConfig", {"target_modules": ["q_proj"], "boft_block_size": 4}),
    "vera": ("llama", "VeraConfig", {"target_modules": ["q_proj"], "r": 4}),
    "fourierft": ("llama", "FourierFTConfig", {"target_modules": ["q_proj"], "n_frequency": 20}),
    "hra": ("llama", "HRAConfig", {"target_modules": ["q_proj"]}),
    "norms": ("llama", "LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]}),
    "c3a": ("llama", "C3AConfig", {"target_modules": ["q_proj"], "block_size": 4}),
    "miss": ("llama", "MissConfig", {"target_modules": ["q_proj"], "r": 4}),
    "randlora": ("llama", "RandLoraConfig", {"target_modules": ["q_proj"], "r": 4}),
    "only tokens": ("llama", "TrainableTokensConfig", {"target_modules": ["embed_tokens"], "token_indices": [1, 5]}),
}
WHOLE = {
    "pissa": ("llama", "LoraConfig", {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "first values"),
    "vblora": (
        "llama",
        "VBLoRAConfig",
        {"target_modules": ["q_proj"], "r": 2, "vector_length": 4, "num_vectors": 8, "topk": 2},
        "VBLORA are merged all at once",
    ),
}


QUICK = {
    ("lora", ""),
    ("experts", ""),
    *((case, "half ") for case in ("lora", "dora", "embedding", "tied", "biases", "modules", "tokens", "head", "ia3")),
    ("transposed", "half "),
    ("adalora", "half "),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bases in several files: of fp32, and by "half " and their kind of bf16."""
    root = tmp_path_factory.mktemp("folders")
    found = {}
    for kind in ("llama", "qwen2", "classifier", "mixtral", "gpt2"):
        if kind == "gpt2":
            torch.manual_seed(0)
            GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)).save_pretrained(
                root / "once"
            )
        else:
            tiny_folder(root / "once", kind)
        for name, dtype in ((kind, torch.float32), (f"half {kind}", torch.bfloat16)):
            found[name] = root / name
            load(root / "once", kind, dtype=dtype).save_pretrained(found[name], max_shard_size="9KB")
        shutil.rmtree(root / "once")
    assert len(list(found["half mixtral"].glob("*.safetensors"))) > 3
    return found


def adapter_of(base: Path, kind: str, config: Any, folder: Path) -> Path:
    """An adapter of random values: all that would be trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load(base, kind, dtype=torch.float32), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def by_peft(base: Path, kind: str, adapter: Path) -> dict[str, torch.Tensor]:
    """By the names in files, in the dtypes of the base."""
    model = load(base, kind)
    dtype = model.dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged: Any = PeftModel.from_pretrained(model.float(), adapter).merge_and_unload(safe_merge=True)
    merged.to(dtype).save_pretrained(adapter / "theirs")
    return tensors(adapter / "theirs")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def require_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name


@pytest.mark.parametrize(
    ("case", "precision"),
    [
        pytest.param(case, precision, marks=() if (case, precision) in QUICK else pytest.mark.table)
        for case in CASES
        for precision in ("", "half ")
    ],
)
def test_every_bit_is_pefts(
    case: str, precision: str, folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind, config, arguments = CASES[case]
    base = folders[precision + kind]
    adapter = adapter_of(base, kind, getattr(peft, config)(**arguments), tmp_path / "adapter")
    with caplog.at_level(logging.WARNING):
        folder = merge(base, adapter, tmp_path / "merged", max_shard_size="9KB")
    assert "whole model" not in caplog.text
    theirs = by_peft(base, kind, adapter)
    require_equal(tensors(folder), theirs)
    before = tensors(base)
    assert any(name not in before or not torch.equal(value, before[name]) for name, value in theirs.items())
    HFFolder(folder)  # the index and the files agree
    assert len(list(folder.glob("*.safetensors"))) > 1
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == ("bfloat16" if precision else "float32")
    assert config["architectures"] == [type(load(folder, kind)).__name__]


@pytest.mark.parametrize("case", WHOLE)
def test_what_needs_the_whole_model_says_so(
    case: str, folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind, config, arguments, reason = WHOLE[case]
    base = folders[kind]
    adapter = adapter_of(base, kind, getattr(peft, config)(**arguments), tmp_path / "adapter")
    with caplog.at_level(logging.WARNING):
        folder = merge(base, adapter, tmp_path / "merged")
    assert "the whole model is held in memory" in caplog.text and reason in caplog.text
    require_equal(tensors(folder), by_peft(base, kind, adapter))


def test_one_module_is_in_memory_at_a_time(folders: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    """Every read is of one module's weights, and nothing is read twice."""
    config = peft.LoraConfig(target_modules=[*ATTENTION, *MLP, "lm_head"])
    adapter = adapter_of(folders["half llama"], "llama", config, tmp_path / "adapter")
    reads: list[set[str]] = []
    read = _stored.StoredModel.read

    def noted(self: Any, names: Any) -> Any:
        reads.append(set(names))
        return read(self, reads[-1])

    monkeypatch.setattr(_stored.StoredModel, "read", noted)
    merge(folders["half llama"], adapter, tmp_path / "merged")
    names = [name for names in reads for name in names]
    assert len(names) == len(set(names)) == 4 * 7 + 1, "the adapted weights; the others are copied"
    assert all(len(names) == 1 for names in reads)


def test_files_in_torchs_own_format_are_merged_too(folders: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    shutil.copyfile(folders["qwen2"] / "config.json", base / "config.json")
    torch.save(tensors(folders["qwen2"]), base / "pytorch_model.bin")
    config = peft.LoraConfig(target_modules=ATTENTION)
    adapter = adapter_of(folders["qwen2"], "qwen2", config, tmp_path / "adapter")
    require_equal(tensors(merge(base, adapter, tmp_path / "merged")), by_peft(folders["qwen2"], "qwen2", adapter))


def test_what_the_model_does_not_read_is_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    """Such as layers that predict more than one token, which transformers leaves out; in a dtype of its own."""
    base = tmp_path / "base"
    shutil.copytree(folders["half llama"], base)
    for file in base.glob("model*"):
        file.unlink()
    more = {"model.layers.4.extra.weight": torch.randn(3, 5)}
    save_file(tensors(folders["half llama"]) | more, base / "model.safetensors")
    adapter = adapter_of(base, "llama", peft.LoraConfig(target_modules=["q_proj"]), tmp_path / "adapter")
    require_equal(tensors(merge(base, adapter, tmp_path / "merged")), by_peft(base, "llama", adapter) | more)


@pytest.mark.parametrize("task", ["FEATURE_EXTRACTION", None])
def test_an_adapter_of_a_model_for_embeddings(task: str | None, folders: dict[str, Path], tmp_path: Path) -> None:
    """The model has no head, and how a text's vector is made of its hidden states goes with it."""
    base = tmp_path / "base"
    AutoModel.from_pretrained(folders["half llama"]).save_pretrained(base)
    (base / "modules.json").write_text('[{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]')
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    config = peft.LoraConfig(target_modules=ATTENTION, task_type=task, init_lora_weights=False)
    model = get_peft_model(AutoModel.from_pretrained(base, dtype=torch.float32), config)
    model.save_pretrained(tmp_path / "adapter")
    folder = merge(base, tmp_path / "adapter", tmp_path / "merged")
    theirs: Any = model.merge_and_unload(safe_merge=True)
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    require_equal(tensors(folder), tensors(tmp_path / "theirs"))
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaModel"]
    for name in ("modules.json", "1_Pooling/config.json"):
        assert (folder / name).read_text() == (base / name).read_text()


def test_tied_weights_of_one_file_or_two(folders: dict[str, Path], tmp_path: Path) -> None:
    """Both in the files, or only the one that transformers does not keep: written once. Trained as one or not."""
    whole = tensors(folders["qwen2"])
    embedding = whole.pop("model.embed_tokens.weight")
    plain = adapter_of(folders["qwen2"], "qwen2", peft.LoraConfig(target_modules=["q_proj"]), tmp_path / "adapter")
    theirs = by_peft(folders["qwen2"], "qwen2", plain)
    for names in (["lm_head.weight"], ["lm_head.weight", "model.embed_tokens.weight"]):
        base = tmp_path / f"base{len(names)}"
        base.mkdir()
        shutil.copyfile(folders["qwen2"] / "config.json", base / "config.json")
        save_file(whole | {name: embedding.clone() for name in names}, base / "model.safetensors")
        require_equal(tensors(merge(base, plain, tmp_path / "merged")), theirs)

    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    adapter = adapter_of(folders["qwen2"], "qwen2", config, tmp_path / "tied")
    merged = merge(folders["qwen2"], adapter, tmp_path / "merged")
    require_equal(tensors(merged), by_peft(folders["qwen2"], "qwen2", adapter))
    alone = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    adapter = adapter_of(folders["qwen2"], "qwen2", alone, tmp_path / "alone")
    with pytest.raises(JobError, match="is also another weight of the base"):
        merge(folders["qwen2"], adapter, tmp_path / "parted")


def test_what_is_damaged_or_does_not_belong_together_is_said(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_of(folders["llama"], "llama", peft.LoraConfig(target_modules=["q_proj"]), tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    first, value = next(iter(weights.items()))

    def base(name: str, change: Any) -> Path:
        shutil.copytree(folders["llama"], tmp_path / name)
        change(tmp_path / name)
        return tmp_path / name

    def other(name: str, changed: dict[str, torch.Tensor]) -> Path:
        shutil.copytree(adapter, tmp_path / name)
        save_file(changed, tmp_path / name / "adapter_model.safetensors")
        return tmp_path / name

    def cut(folder: Path) -> None:
        file = sorted(folder.glob("*.safetensors"))[1]
        file.write_bytes(file.read_bytes()[:-8])

    def without(folder: Path) -> None:
        left = tensors(folder)
        del left["model.norm.weight"]
        for file in folder.glob("model*"):
            file.unlink()
        save_file(left, folder / "model.safetensors")

    def wider(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))

    broken, torn, bare = other("broken", weights), other("torn", weights), other("bare", weights)
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    (torn / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes()[:-8])
    (bare / "adapter_model.safetensors").unlink()
    (tmp_path / "rows").touch()
    shapes = r"does not fit its base: Error.*(\n  size mismatch.*){3}\n  and 5 more\n  remedy: name the base"
    cases = [
        (base("cut", cut), adapter, "is not a whole weight file"),
        (base("gone", lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink()), adapter, "is missing"),
        (base("lacks", without), adapter, "lacks model.norm.weight"),
        (base("wider", wider), adapter, r"has the shape \[32, 16\], config.json says \[48, 16\]"),
        (tiny_folder(tmp_path / "large", "llama", hidden_size=32), adapter, shapes),
        (tiny_folder(tmp_path / "low", "llama", num_hidden_layers=2), adapter, r"has .*layers\.[23]\."),
        (folders["llama"], other("short", {n: v for n, v in weights.items() if n != first}), "lacks "),
        (folders["llama"], other("nan", weights | {first: value * float("nan")}), "cannot be merged"),
        (folders["llama"], broken, "adapter_model.safetensors is not a whole weight file"),
        (folders["llama"], torn, r"is not a whole weight file(.*\n)+  remedy: copy it again"),
        (folders["llama"], bare, "holds no adapter_model.safetensors"),
    ]
    for folder, given, says in cases:
        with pytest.raises(JobError, match=says):
            merge(folder, given, tmp_path / "merged")
    with pytest.raises(JobError, match="'much' is no size"):
        merge(folders["llama"], adapter, tmp_path / "merged", max_shard_size="much")
    for target in (tmp_path / "rows" / "x", Path("/proc/foo"), tmp_path / ("x" * 300)):
        with pytest.raises(JobError, match=rf"^target: {target} cannot be made: (.*\n)+  remedy: name a new folder"):
            merge(folders["llama"], adapter, target)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(RunError, match="the disk is full"):
        merge(folders["llama"], adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".merged*"))
