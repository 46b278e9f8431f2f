"""Which tuners go together, what each refuses, and which weights learn."""

from __future__ import annotations

import pytest

from swift_dist.config import JobConfig
from swift_dist.errors import JobError
from swift_dist.plugins import find, names
from swift_dist.tuners._patterns import matches
from swift_dist.tuners._stack import find_tuners
from swift_dist.tuners.base import Tuner
from tests.tuners.tiny import learning, load, stack_of

LAYER = "model.layers.{}.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lors", "did you mean lora"),
        ("lora,lora", "named twice"),
        ("lora,ia3", "both say which weights learn"),
        ("full,freeze", "both say which weights learn"),
        ("lora,galore", "galore and lora contradict"),
        ("neftune,lisa,galore", "galore and lisa contradict"),
    ],
)
def test_lists_that_make_no_sense_are_refused(name, says):
    with pytest.raises(JobError, match=says) as caught:
        stack_of(name)
    assert caught.value.key == "tuner.name" and caught.value.remedy


def test_options_of_a_tuner_that_is_not_named_are_refused():
    with pytest.raises(JobError, match=r"tuner.lora: has options, and tuner.name \(qlora\) does not name it"):
        stack_of("qlora", lora={"rank": 4})
    stack_of("qlora", lora={"rank": 8})  # as a run folder's job.yaml writes it: the default


def test_additions_alone_stand_beside_full_fine_tuning():
    stack = stack_of("galore,neftune")
    assert [tuner.name for tuner, _ in stack.members] == ["full", "galore", "neftune"]
    assert stack.main[0].name == "full" and stack.saves == "model"
    assert [tuner.name for tuner, _ in stack_of("neftune,lora").members] == ["neftune", "lora"]
    assert stack_of("neftune,lora").main[0].name == "lora" and stack_of("neftune,lora").saves == "adapter"


def test_a_tuner_from_outside_is_found_with_its_own_options():
    stack = find_tuners(JobConfig.model_validate({"tuner": {"name": "swift_dist.tuners.ia3:TUNER"}}).tuner)
    tuner, options = stack.members[0]
    assert tuner.name == "ia3" and options.target_modules == ("k_proj", "v_proj", "down_proj")


def test_every_file_has_a_tuner_of_its_name():
    for name in names("swift_dist.tuners"):
        tuner = find("swift_dist.tuners", name, "TUNER")
        assert isinstance(tuner, Tuner) and tuner.name == name and tuner.summary


REFUSED = {
    "full": set(),
    "freeze": set(),
    "lora": set(),
    "ia3": set(),
    "llama_pro": set(),
    "neftune": set(),
    "qlora": set(),
    "adalora": {"fsdp2", "zero1", "zero2", "zero3"},
    "galore": {"fsdp2", "zero1", "zero2", "zero3"},
    "lisa": {"zero1", "zero2", "zero3"},
}


@pytest.mark.parametrize("name", names("swift_dist.tuners"))
def test_strategies_that_a_tuner_refuses(name):
    stack = stack_of(name)
    for strategy in ("ddp", "fsdp2", "zero1", "zero2", "zero3"):
        if strategy in REFUSED[name]:
            with pytest.raises(JobError, match=f"{name} does not work under {strategy}: .*\n.*use ddp"):
                stack.refuse(strategy)
        else:
            stack.refuse(strategy)


def test_qlora_of_8_bits_refuses_what_replaces_its_tensors():
    stack = stack_of("qlora", qlora={"bits": 8})
    with pytest.raises(JobError, match="keeps the scales of 8-bit weights on the tensor itself") as caught:
        stack.refuse("fsdp2")
    assert "use ddp or zero2 or zero3" in caught.value.remedy
    stack.refuse("zero3")


@pytest.mark.parametrize(
    ("pattern", "name", "does"),
    [
        ("layers.1", LAYER.format(1), True),
        ("layers.1", LAYER.format(10), False),
        ("layers.[0-3].self_attn", LAYER.format(2), True),
        ("q_proj", LAYER.format(0), True),
        ("proj", LAYER.format(0), False),
        ("*_proj", LAYER.format(0), True),
        ("self_attn.weight", LAYER.format(0), False),
        (LAYER.format(0), LAYER.format(0), True),
        (LAYER.format(0) + ".more", LAYER.format(0), False),
    ],
)
def test_patterns_are_of_whole_words(pattern, name, does):
    assert matches(name, pattern) is does


def test_freeze_by_patterns_and_by_share(bases):
    model = load(bases["llama"])
    everything = learning(model)
    stack_of("freeze", freeze={"parameters": ["layers.[0-2]", "embed_tokens"]}).apply(model, seed=0)
    expected = {n for n in everything if n.startswith(("model.layers.3", "model.norm", "lm_head"))}
    assert learning(model) == expected

    model = load(bases["llama"])
    sizes = [(n, p.numel()) for n, p in model.named_parameters()]
    half = sum(size for _, size in sizes) / 2
    stack_of("freeze", freeze={"ratio": 0.5}, trainable=["embed_tokens"]).apply(model, seed=0)
    frozen, first_learning = [], None
    for name, parameter in model.named_parameters():
        if name == "model.embed_tokens.weight":
            assert parameter.requires_grad, "tuner.trainable wins"
        elif not parameter.requires_grad:
            frozen.append(name)
        else:
            first_learning = first_learning or name
    held = sum(size for n, size in sizes if n in frozen) + dict(sizes)["model.embed_tokens.weight"]
    assert held <= half < held + dict(sizes)[first_learning]
    assert [n for n, _ in sizes][1 : len(frozen) + 1] == frozen, "from the embedding upwards"


@pytest.mark.parametrize(
    ("name", "section", "says"),
    [
        ("freeze", {"freeze": {"ratio": 1.0}}, "no weight is left"),
        ("freeze", {"freeze": {"parameters": ["layers.9"]}}, "'layers.9' matches none"),
        ("lora", {"trainable": ["nothing"]}, "'nothing' matches none"),
        ("lora", {"lora": {"target_modules": "nothing"}}, "is called 'nothing'"),
        ("lora", {"lora": {"target_modules": "q_proj,v_porj"}}, "is called 'v_porj'"),
        ("lora", {"lora": {"target_modules": ["all-linear", "q_proj"]}}, "is called 'all-linear'"),
        ("lora", {"lora": {"exclude_modules": "k_proj,o_porj"}}, "is called 'o_porj'"),
        ("lora", {"lora": {"rank_pattern": {"q_proj": 2, "qq_proj": 4}}}, "is called 'qq_proj'"),
        ("lora", {"lora": {"alpha_pattern": {"q_(proj": 2}}}, "no regular expression"),
        ("ia3", {"ia3": {"target_modules": "k_proj,fc2", "feedforward_modules": ""}}, "is called 'fc2'"),
        ("lisa", {"lisa": {"active_layers": 5}}, "5 of 4 layers"),
        ("llama_pro", {"llama_pro": {"blocks": 3}}, "4 layers and 3 new ones"),
        ("ia3", {"ia3": {"feedforward_modules": ["up_proj"]}}, "up_proj is not among"),
        ("qlora", {}, "is not quantised"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(name, section, says, bases):
    with pytest.raises(JobError, match=says) as caught:
        stack_of(name, **section).apply(load(bases["llama"]), seed=0)
    assert caught.value.key.startswith("tuner.") and caught.value.remedy


@pytest.mark.parametrize(
    ("name", "section", "job", "says"),
    [
        ("freeze", {}, {}, "of no weight that it stays"),
        ("full", {"trainable": ["lm_head"]}, {}, "every weight learns"),
        ("lisa", {"trainable": ["lm_head"]}, {}, "every weight may learn"),
        ("adalora", {"adalora": {"warmup_steps": 2, "final_steps": 1}}, {"train": {"steps": 3}}, "none of 3 steps"),
        ("qlora", {}, {"model": {"config": {"model_type": "llama"}}}, "random weights are not quantised"),
    ],
)
def test_what_the_job_contradicts_is_refused_before_it_starts(name, section, job, says):
    whole = JobConfig.model_validate({"tuner": {"name": name, **section}, **job})
    with pytest.raises(JobError, match=says) as caught:
        find_tuners(whole.tuner).check(whole)
    assert caught.value.remedy
    if name in ("adalora", "qlora"):
        other = {"tuner": {"name": name, **section}, "train": {"steps": 4}, "model": {"path": "x"}}
        find_tuners(whole.tuner).check(JobConfig.model_validate(other))


def test_what_cannot_be_taken_apart_or_parted_is_refused(bases):
    with pytest.raises(JobError, match="experts of a MixtralForCausalLM lie in one tensor"):
        stack_of("lora", lora={"init": "pissa"}).apply(load(bases["mixtral"]), seed=0)
    with pytest.raises(JobError, match="ia3 cannot train an embedding that is the output layer's"):
        stack_of("ia3", trainable=["embed_tokens"]).apply(load(bases["qwen2"]), seed=0)


def test_llama_pro_trains_its_new_layers(bases):
    model = load(bases["qwen2"], "qwen2")
    stack_of("llama_pro", llama_pro={"blocks": 2}, trainable=["model.norm"]).apply(model, seed=0)
    new = {name for name in learning(model) if name != "model.norm.weight"}
    assert {".".join(name.split(".")[:3]) for name in new} == {"model.layers.2", "model.layers.5"}
    assert "model.norm.weight" in learning(model)
    assert model.config.num_hidden_layers == len(model.config.layer_types) == len(model.model.layers) == 6
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(6))


def test_llama_pro_makes_text_with_its_cache(bases):
    """Two layers with one number would share a place in the cache: text would differ from that without a cache."""
    import torch

    from tests.tuners.tiny import batch, train

    stack = stack_of("llama_pro", llama_pro={"blocks": 2})
    model = stack.apply(load(bases["llama"]), seed=0)
    train(model, stack)
    model.eval()
    texts = [
        model.generate(batch(1), max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    ]
    assert torch.equal(*texts)
