"""LoRA's kin: learning rates, first factors that the base gives up, the model without its adapter, resumes."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from swift_dist.errors import RunError
from tests.tuners.tiny import difference, export, groups_of, learning, load, logits, stack_of, train


def test_lora_plus_gives_b_a_rate_of_its_own(bases):
    stack = stack_of("lora", lora={"lora_plus_ratio": 16.0})
    model = stack.apply(load(bases["llama"]), seed=0)
    groups = {group["lr_scale"]: group["names"] for group in groups_of(model, stack, 0.01)}
    assert set(groups) == {1.0, 16.0}
    assert all(".lora_B." in name for name in groups[16.0])
    assert all(".lora_A." in name for name in groups[1.0])
    assert len(groups[1.0]) == len(groups[16.0]) == 4 * 7
    assert stack_of("lora").learning_rate_scale(groups[16.0][0]) == 1.0


def test_first_values_come_from_the_seed_alone(bases):
    def first(seed: int) -> torch.Tensor:
        model = stack_of("lora").apply(load(bases["llama"]), seed=seed)
        return model.base_model.model.model.layers[1].mlp.up_proj.lora_A["default"].weight.detach()

    state = torch.get_rng_state()
    a = first(1)
    assert torch.equal(torch.get_rng_state(), state), "generators outside are left alone"
    torch.rand(3)
    assert torch.equal(first(1), a) and not torch.equal(first(2), a)


def test_pissa_starts_from_the_leading_singular_vectors(bases):
    weight = load(bases["llama"]).model.layers[0].mlp.up_proj.weight.detach()
    model = stack_of("lora", lora={"init": "pissa", "rank": 4, "alpha": 8}).apply(load(bases["llama"]), seed=0)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    product = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    u, s, vh = torch.linalg.svd(weight)
    torch.testing.assert_close(product, u[:, :4] @ torch.diag(s[:4]) @ vh[:4], rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.base_layer.weight, weight - product, rtol=0, atol=1e-5)


def test_pissa_is_exported_as_plain_lora_and_would_be_wrong_without_that(bases, tmp_path):
    stack = stack_of("lora", lora={"init": "pissa", "rank": 4})
    model = stack.apply(load(bases["llama"]), seed=0)
    train(model, stack)
    folder = export(model, stack, tmp_path / "out")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 64, True)
    entries = load_file(folder / "adapter_model.safetensors")
    assert entries["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (8, 16)
    # the control: A and B as they were trained, which is what a plain save writes
    halves = {n: (t[:4] if ".lora_A." in n else t[:, :4]).contiguous() for n, t in entries.items()}
    save_file(halves, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 4, "lora_alpha": 32}))
    naive = PeftModel.from_pretrained(load(bases["llama"]), folder)
    assert difference(logits(naive), logits(model)) > 0.1


@pytest.mark.parametrize("section", [{}, {"use_dora": True}, {"init": "pissa"}, {"bias": "all"}])
def test_the_model_without_its_adapter(section, bases):
    """Where there is such a context, it computes what the base did; else there is none."""
    stack = stack_of("lora", lora=section, trainable=["lm_head"])
    base = load(bases["qwen2"] if "bias" in section else bases["llama"])
    before = logits(base)
    model = stack.apply(base, seed=0)
    train(model, stack)
    context = stack.without(model)
    if section.get("init") or section.get("bias"):
        assert context is None
        with model.disable_adapter():  # why: the weights beneath have changed
            assert difference(logits(model), before) > 1e-3
    else:
        with context:
            assert difference(logits(model), before) == 0
        assert difference(logits(model), before) > 1e-3
    assert stack_of("full").without(model) is None


def test_a_tied_embedding_and_output_layer_learn_together(bases, tmp_path):
    stack = stack_of("lora", trainable=["embed_tokens"])
    model = stack.apply(load(bases["qwen2"], "qwen2"), seed=0)
    inner = model.base_model.model
    head, embedding = inner.lm_head.modules_to_save["default"], inner.model.embed_tokens.modules_to_save["default"]
    assert head.weight is embedding.weight
    train(model, stack)
    assert not torch.equal(embedding.weight, inner.model.embed_tokens.original_module.weight)
    entries = load_file(export(model, stack, tmp_path / "out") / "adapter_model.safetensors")
    assert torch.equal(
        entries["base_model.model.lm_head.weight"], entries["base_model.model.model.embed_tokens.weight"]
    )


def test_a_resume_of_pissa_exports_what_the_run_did(bases, tmp_path):
    """What a checkpoint holds: the weights that learn, and the tuner's state; the base is made again."""
    stack = stack_of("lora", lora={"init": "pissa_niter_1", "rank": 4})
    model = stack.apply(load(bases["llama"]), seed=0)
    train(model, stack)
    saved = {n: p.detach().clone() for n, p in model.named_parameters() if n in learning(model)}
    again = stack.apply(load(bases["llama"]), seed=0)
    # another sign of a singular vector: the same product, so the same base
    layer = again.base_model.model.model.layers[0].mlp.up_proj
    initial = again.swift_dist_initial_factors
    for kind, factor in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
        name = next(n for n, p in again.named_parameters() if p is factor["default"].weight)
        initial[name] = initial[name].neg()
        assert kind in name
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            parameter.copy_(saved.get(name, parameter))
    stack.load_state(again, stack.state(model))
    first, second = (
        load_file(export(m, stack, tmp_path / str(i)) / "adapter_model.safetensors")
        for i, m in enumerate((model, again))
    )
    assert all(torch.equal(first[n], second[n]) for n in first)

    other = stack.apply(load(bases["llama"]), seed=0)
    name = next(iter(other.swift_dist_initial_factors))
    other.swift_dist_initial_factors[name] = other.swift_dist_initial_factors[name] * 1.01
    with pytest.raises(RunError, match="initial decomposition of this weight differs"):
        stack.load_state(other, stack.state(model))


def test_exported_names_are_the_adapters_and_what_learns_beside(bases):
    stack = stack_of("lora", lora={"bias": "all"}, trainable=["lm_head"])
    model = stack.apply(load(bases["qwen2"], "qwen2"), seed=0)
    asked = set(stack.exported(model))
    assert learning(model) <= asked
    assert not any(".base_layer.weight" in name or "original_module" in name for name in asked)
    assert asked <= set(model.state_dict())
