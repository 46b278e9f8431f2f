"""What tests of adapters share: models with LoRA adapters that PEFT trained, and the conversions as functions."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from swift_dist.convert import hf_to_megatron, megatron_to_hf
from swift_dist.convert.sources import open_source
from swift_dist.converters.dist_index import dist_index
from swift_dist.converters.mapping import QKV, Experts, GatedMLP, checkpoint_key
from swift_dist.converters.reading import Reader, as_torch
from tests.converters import tiny_models

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": [*ATTENTION, *MLP, "lm_head"], "r": 4, "lora_alpha": 16}),
    "qwen2": ("qwen2", {"target_modules": [*ATTENTION, *MLP], "r": 8, "lora_alpha": 4, "use_rslora": True}),
    "qwen3_moe": ("qwen3_moe", {"target_modules": ATTENTION, "r": 4, "lora_alpha": 8}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "down_proj", "gate_proj"],
            "r": 4,
            "lora_alpha": 6,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 6},
            "alpha_pattern": {r"layers\.[02]\.self_attn\.v_proj": 3, "mlp.down_proj": 5},
            "layers_to_transform": [0, 1],
            "use_rslora": True,
        },
    ),
}
TOKENS = torch.arange(40).reshape(2, 20) % 61
Trained = Callable[[str], Any]


@cache
def trainer(folder: Path) -> Trained:
    """By a name of SETTINGS: .base and .adapter (folders), .tensors, .merged (PEFT's merged weights), .logits."""

    @cache
    def train(name: str) -> Any:
        model_name, settings = SETTINGS[name]
        base, adapter, theirs = (folder / f"lora_{name}" / part for part in ("base", "adapter", "merged"))
        tiny_models.save_tiny_model(model_name, base)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings)
        )
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        for _ in range(3):
            model(TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(adapter, save_embedding_layers=False)  # PEFT adds lm_head itself otherwise
        logits = adapted(base, adapter)
        merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
        merged.save_pretrained(theirs)
        tensors = load_file(adapter / "adapter_model.safetensors")
        assert all(values.abs().max() > 0 for values in tensors.values()), "nothing was trained"
        return SimpleNamespace(
            base=base, adapter=adapter, tensors=tensors, merged=load_file(theirs / "model.safetensors"), logits=logits
        )

    return train


def adapted(base: Path, adapter: Path) -> torch.Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()(TOKENS).logits


def to_megatron(source: Path, target: Path, **options: Any) -> dict[str, Any]:
    words = {"workers": 1, **({"logits": "never"} if options.get("verify") else {}), **options}
    return hf_to_megatron.run(hf_to_megatron.HFToMegatronOptions(source=str(source), target=str(target), **words))


def to_hf(source: Path, target: Path, **options: Any) -> dict[str, Any]:
    words = {"workers": 1, **({"logits": "never"} if options.get("verify") else {}), **options}
    return megatron_to_hf.run(megatron_to_hf.MegatronToHFOptions(source=str(source), target=str(target), **words))


def require_equal(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, values in wanted.items():
        assert got[name].dtype == values.dtype and torch.equal(got[name], values), name


def read_all(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = Reader()
    return {name: as_torch(reader.read(stored)) for name, stored in dist_index(checkpoint).items()}


def fused(made: Any, folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint of fused adapters of random values; returns the PEFT tensors that it stands for."""
    torch.manual_seed(5)
    source = open_source(str(made.base))
    state: dict[str, list[torch.Tensor]] = {}
    wanted: dict[str, torch.Tensor] = {}
    for row in source.rows:
        experts = row.num_experts if isinstance(row, Experts) else 0
        base = row.row if isinstance(row, Experts) else row
        if not isinstance(base, (QKV, GatedMLP)) or base.columns is None:
            continue
        for layer, expert in itertools.product(base.layers, range(experts) or (None,)):
            tensor = base.at(layer, expert)
            a, b = torch.randn(4, tensor.shape[1]), torch.randn(tensor.shape[0], 4)
            module, _ = checkpoint_key(tensor.name.removesuffix("weight") + "adapter.")
            for side, values in (("linear_in", a), ("linear_out", b)):
                state.setdefault(f"{module}{side}.weight", []).append(values)
            for name in dict.fromkeys(piece.hf for piece in tensor.pieces):
                peft = f"base_model.model.{name.removesuffix('.weight')}"
                parts = [piece for piece in tensor.pieces if piece.hf == name]
                wanted[f"{peft}.lora_A.weight"] = a
                wanted[f"{peft}.lora_B.weight"] = torch.cat([b[slice(*piece.megatron_box[0])] for piece in parts])
    whole = {name: torch.stack(each) if ".experts." in name else each[0] for name, each in state.items()}
    dcp.save(whole, checkpoint_id=str(folder), no_dist=True)
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text((made.base / "config.json").read_text())
    (folder / "hf" / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2}))
    return wanted


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], base: Path, **config: Any) -> None:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    stated = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base), **config}
    (folder / "adapter_config.json").write_text(json.dumps(stated))


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
PLAIN = {f"{Q}A.weight": torch.ones(2, 32), f"{Q}B.weight": torch.ones(32, 2)}
