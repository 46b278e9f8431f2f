"""Several adapters on one model in Python; adapters merged into their base."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import swift_dist
from swift_dist import cli
from swift_dist.errors import JobError, RunError
from swift_dist.tuners import adalora, ia3, lora, merge, neftune
from tests.tuners.tiny import batch, difference, export, learning, load, logits, stack_of, train

ADAPTERS = {
    "a": lora.Options(rank=4),
    "gate": ia3.Options(),
    "b": lora.Options(rank=2, target_modules=("q_proj", "down_proj"), use_dora=True),
}


def learn(model: Any, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for _ in range(steps):
        model(input_ids=batch()).logits.log_softmax(-1)[..., 1].mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_adapters_act_alone_and_together_and_come_back(kind, bases, tmp_path):
    base = load(bases[kind], kind)
    plain, names = logits(base), list(base.state_dict())
    model = swift_dist.prepare_model(base, ADAPTERS)
    assert model.active == ("a", "gate", "b")
    assert difference(logits(model), plain) == 0
    learn(model)
    together = logits(model)

    alone = {}
    for name in ADAPTERS:
        model.activate(name)
        alone[name] = logits(model)
        assert {n.split(".")[-2 if "lora_" in n else -1] for n in learning(model)} == {name}
    assert all(difference(x, plain) > 1e-3 for x in alone.values())
    model.activate("a", "gate")
    pair = logits(model)
    assert difference(pair, alone["a"]) > 1e-3 and difference(pair, together) > 1e-3
    model.deactivate()
    assert difference(logits(model), plain) == 0 and learning(model) == set()
    model.activate("a", "gate", "b")
    model.deactivate("b")
    assert model.active == ("a", "gate") and torch.equal(logits(model), pair)

    model.save_pretrained(tmp_path / "adapters")
    again = swift_dist.from_pretrained(load(bases[kind], kind), tmp_path / "adapters")
    assert set(again.active) == set(ADAPTERS) and learning(again) == set()
    assert difference(logits(again), together) < 1e-6
    for name in ADAPTERS:
        one = PeftModel.from_pretrained(load(bases[kind], kind), tmp_path / "adapters" / name)
        assert difference(logits(one), alone[name]) < 1e-6, "PEFT reads each"
        assert swift_dist.from_pretrained(load(bases[kind], kind), tmp_path / "adapters" / name).active == (name,)
    merged = again.merge()
    assert type(merged) is type(base) and list(merged.state_dict()) == names
    assert difference(logits(merged), together) < 2e-6


def test_only_active_adapters_learn_and_are_merged(bases):
    model = swift_dist.prepare_model(load(bases["llama"]), ADAPTERS, seed=1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.activate("b")
    learn(model)
    alone = logits(model)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == learning(model) and all(".b." in name or name.endswith(".b") for name in moved)
    assert difference(logits(model.merge()), alone) < 2e-6


def test_first_values_come_from_the_seed(bases):
    states = [swift_dist.prepare_model(load(bases["llama"]), ADAPTERS, seed=s).state_dict() for s in (1, 1, 2)]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert any(not torch.equal(states[0][n], states[2][n]) for n in states[0])


@pytest.mark.parametrize(
    ("adapters", "says"),
    [
        ({}, "none is given"),
        ({"x": neftune.Options()}, "no options of an adapter"),
        ({"x": adalora.Options()}, "ADALORA cannot be mixed"),
        ({"x": lora.Options(init="pissa")}, "change the weights that others build on"),
        ({"x.y": lora.Options()}, "no name of an adapter"),
        ({"x": lora.Options(target_modules=("q_proj", "nothing"))}, "is called 'nothing'"),
    ],
)
def test_what_cannot_be_mixed_is_refused(adapters, says, bases):
    with pytest.raises(JobError, match=says):
        swift_dist.prepare_model(load(bases["llama"]), adapters)


def test_names_and_folders_that_do_not_fit_are_refused(bases, tmp_path):
    with pytest.raises(JobError, match="experts in one tensor"):
        swift_dist.prepare_model(load(bases["mixtral"]), {"x": lora.Options()})
    model = swift_dist.prepare_model(load(bases["llama"]), {"x": lora.Options()})
    with pytest.raises(JobError, match="there is no 'y'"):
        model.activate("y")
    with pytest.raises(JobError, match="holds no adapter_config"):
        swift_dist.from_pretrained(load(bases["llama"]), tmp_path)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    with pytest.raises(JobError, match="not those that its config describes"):
        swift_dist.from_pretrained(load(bases["llama"]), tmp_path)


MERGED = [
    ("llama", "lora", {"lora": {"use_dora": True}}),
    ("llama", "adalora", {"adalora": {"initial_rank": 4, "target_rank": 2}}),
    ("qwen2", "lora", {"lora": {"init": "pissa"}}),
    ("qwen2", "lora", {"trainable": ["embed_tokens"]}),
    ("classifier", "ia3", {}),
    ("mixtral", "lora", {}),
]


@pytest.mark.parametrize("case", MERGED, ids=lambda case: "-".join(map(str, case)).replace(" ", ""))
def test_a_merged_model_computes_what_base_and_adapter_do(case, bases, tmp_path):
    kind, name, section = case
    stack = stack_of(name, **section)
    model = stack.apply(load(bases[kind], kind), seed=0)
    train(model, stack, steps=3)
    adapter = export(model, stack, tmp_path / "adapter")
    (adapter / "tokenizer.json").write_text("theirs")
    folder = merge(bases[kind], adapter, tmp_path / "merged")
    assert difference(logits(load(folder, kind)), logits(model)) < 2e-6
    assert (folder / "tokenizer.json").read_text() == "theirs"


def test_the_verb_merges_into_the_base_that_the_adapter_names(bases, tmp_path, capsys):
    stack = stack_of("ia3")
    model = stack.apply(load(bases["llama"]), seed=0)
    train(model, stack, steps=3)
    adapter, target = export(model, stack, tmp_path / "adapter"), tmp_path / "merged"
    assert cli.main(["merge", str(adapter), str(target)]) == 0
    assert f"wrote {target}" in capsys.readouterr().out
    assert difference(logits(load(target)), logits(model)) < 2e-6
    gone, nowhere = tmp_path / "adapter" / "gone", tmp_path / "nowhere"
    gone.mkdir()
    (gone / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(nowhere)}))
    for words, says in (
        ([str(adapter), str(target)], "merged exists"),
        ([str(adapter), str(tmp_path / ("x" * 300))], "target: "),
        ([str(gone), "x"], f"base: {gone}/adapter_config.json names {nowhere}: there is no folder"),
        ([str(gone), "x"], "remedy: give --base"),
        ([str(target), "x"], "no adapter_config.json"),
        ([str(tmp_path), "x"], f"its adapter is {adapter}"),
        ([str(adapter), str(tmp_path / "x"), "--base", str(nowhere)], f"base: there is no folder {nowhere}"),
        ([str(adapter)], "target"),
    ):
        assert cli.main(["merge", *words]) == 2
        assert says in capsys.readouterr().err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter", "merged"]


def test_a_merge_rounds_once_to_the_dtype_of_the_base(bases, tmp_path):
    half = load(bases["llama"], dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "base")
    stack = stack_of("lora")
    model = stack.apply(load(tmp_path / "base", dtype=torch.float32), seed=0)
    train(model, stack)
    adapter = export(model, stack, tmp_path / "adapter")
    merged = load(merge(tmp_path / "base", adapter, tmp_path / "merged"), dtype="auto")
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    exact = layer.base_layer.weight + layer.get_delta_weight("default")
    assert torch.equal(merged.model.layers[1].mlp.up_proj.weight, exact.to(torch.bfloat16))


def test_merges_of_what_is_missing_or_parted_are_refused(bases, tmp_path):
    with pytest.raises(JobError, match="has no adapter_config"):
        merge(bases["llama"], tmp_path, tmp_path / "merged")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(JobError, match="has no config"):
        merge(tmp_path, tmp_path, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()

    base = load(bases["qwen2"], "qwen2")
    parted = get_peft_model(base, LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    parted.save_pretrained(tmp_path / "parted", save_embedding_layers=False)
    mixed = swift_dist.prepare_model(
        load(bases["qwen2"], "qwen2"), {"x": lora.Options(target_modules=("q_proj", "lm_head"))}
    )
    with pytest.raises(RunError, match="is also another weight"):
        mixed.merge()
    with pytest.raises(JobError, match="is also another weight of the base"):
        merge(bases["qwen2"], tmp_path / "parted", tmp_path / "merged")
