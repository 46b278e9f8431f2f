"""Every tuner: what it computes before it learns, and that its export, read by transformers or PEFT, computes what the
trained model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from swift_dist.plugins import names
from tests.tuners.tiny import difference, export, learning, load, logits, reloaded, stack_of, train

SMALL = {
    "adalora": {"initial_rank": 4, "target_rank": 2},
    "llama_pro": {"blocks": 2},
    "galore": {"rank": 4},
    "freeze": {"ratio": 0.4},
}
CASES: list[tuple[str, str | list[str], dict[str, Any]]] = [
    *(("llama", name, {}) for name in names("swift_dist.tuners") if name != "qlora"),  # test_qlora.py
    *((kind, "full", {}) for kind in ("qwen2", "classifier", "mixtral")),
    *((kind, "lora", {}) for kind in ("qwen2", "classifier", "mixtral")),
    ("classifier", "ia3", {}),
    ("classifier", "adalora", {}),
    ("qwen2", "adalora", {"trainable": ["embed_tokens"]}),
    ("qwen2", "llama_pro", {}),
    ("mixtral", "llama_pro", {}),
    ("classifier", "llama_pro", {"trainable": ["score"]}),
    ("qwen2", "lora", {"lora": {"use_dora": True, "bias": "all"}}),
    ("qwen2", "lora", {"lora": {"init": "pissa"}}),
    ("llama", "lora", {"lora": {"init": "olora", "use_dora": True}}),
    ("llama", "lora", {"lora": {"init": "orthogonal", "bias": "lora_only"}}),
    (
        "llama",
        "lora",
        {
            "lora": {
                "init": "pissa_niter_4",
                "use_rslora": True,
                "rank_pattern": {"q_proj": 4},
                "alpha_pattern": {"k_proj": 4},
            }
        },
    ),
    ("qwen2", "lora", {"trainable": ["embed_tokens"]}),
    ("llama", "lora", {"trainable": ["layers.0", "lm_head"]}),
    ("llama", "ia3", {"trainable": ["*norm*"]}),
    ("llama", ["lora", "neftune"], {}),
    ("llama", ["full", "galore", "neftune"], {}),
]


def small(name: str | list[str]) -> dict[str, Any]:
    """Options of these tuners that fit tiny models."""
    named = [name] if isinstance(name, str) else name
    return {key: options for key, options in SMALL.items() if key in named}


def _id(case: tuple[str, Any, dict[str, Any]]) -> str:
    return "-".join(map(str, case)).replace(" ", "")


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_an_export_computes_what_the_trained_model_does(case, bases, tmp_path):
    kind, name, section = case
    stack = stack_of(name, **small(name) | section)
    base = load(bases[kind], kind)
    before = logits(base)
    model = stack.apply(base, seed=3)
    is_taken_apart = "init" in section.get("lora", {})  # W - s B A + s B A is W but for its rounding
    assert difference(logits(model), before) < (5e-6 if is_taken_apart else 1e-9), "identity before it learns"
    train(model, stack)
    trained = logits(model)
    assert difference(trained, before) > 1e-3, "it learns"
    folder = export(model, stack, tmp_path / "out")
    assert difference(logits(reloaded(bases[kind], kind, stack, folder)), trained) < 1e-6
    assert difference(logits(model), trained) == 0, "an export changes nothing"
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_only_what_learns_has_changed(bases):
    """By the values, not by requires_grad: the weights that are said to learn, and no others, move in two steps."""
    for name in ("full", "freeze", "lora", "ia3", "llama_pro", "adalora"):
        stack = stack_of(name, **small(name))
        model = stack.apply(load(bases["qwen2"], "qwen2"), seed=0)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        said = learning(model)
        train(model, stack, steps=3)
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        given_up = {n for n in said if ".lora_E." in n and not before[n].any()} - moved  # AdaLoRA's ranks
        assert moved == said - given_up, name


def test_weights_are_saved_in_several_files_with_their_dtype_and_tied_ones_once(bases, tmp_path):
    stack = stack_of("full")
    model = stack.apply(load(bases["qwen2"], "qwen2"), seed=0)
    weights = {n: t.to(torch.bfloat16) for n, t in model.state_dict().items()}  # tied ones as two tensors
    stack.export(model, weights, tmp_path / "out", "20KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    again = load(tmp_path / "out", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.lm_head.weight, weights["model.embed_tokens.weight"])


def test_an_export_that_fails_leaves_the_last_one(bases, tmp_path):
    stack = stack_of("full")
    model = stack.apply(load(bases["llama"]), seed=0)
    folder = export(model, stack, tmp_path / "out")
    before = load_file(folder / "model.safetensors")
    with pytest.raises(AssertionError, match="weights are missing"):
        stack.export(model, {"lm_head.weight": model.lm_head.weight}, folder)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    held = model.state_dict()
    with pytest.raises(ValueError):
        stack.export(model, held, folder, "no size")
    assert torch.equal(load_file(folder / "model.safetensors")["lm_head.weight"], before["lm_head.weight"])
    stack.export(model, held, folder)
    assert torch.equal(load_file(folder / "model.safetensors")["lm_head.weight"], before["lm_head.weight"] + 1)
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_an_adapter_names_its_base_and_no_place_of_ours(bases, tmp_path):
    stack = stack_of("lora")
    model = stack.apply(load(bases["classifier"], "classifier"), seed=0)
    folder = export(model, stack, tmp_path / "out")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(bases["classifier"])
    assert config["task_type"] == "SEQ_CLS" and config["inference_mode"] is True
    entries = set(load_file(folder / "adapter_model.safetensors"))
    assert "base_model.model.score.weight" in entries, "a new head is saved with the adapter"
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in entries
    assert not Path(folder / "README.md").exists()
