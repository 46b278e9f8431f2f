"""Every shipped recipe resolves to a job whose layout is possible and sensible; what is not trained is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from swift_dist.config import JobConfig
from swift_dist.config.load import load_job
from swift_dist.errors import JobError
from swift_dist.models import find_family, read_hf_config
from swift_dist.parallel import ModelShape, ParallelLayout, crossing_groups, place_ranks, require_valid
from swift_dist.recipes import (
    ListOptions,
    ShowOptions,
    list_recipes,
    list_verb,
    read_recipe,
    recipe_path,
    render_list,
    render_show,
    show_verb,
)
from swift_dist.resolve import resolve

NOT_TRAINED = {"mixtral", "deepseek_v3"}
MEMORY_GIB = 80

# From the model cards and reports: total and active parameters, in billions, to the digits that are published.
PUBLISHED = {
    "llama-3.1-8b": ("8.03", "8.03"),
    "llama-3.1-70b": ("70.55", "70.55"),
    "qwen3-0.6b": ("0.60", "0.60"),
    "qwen3-1.7b": ("1.72", "1.72"),
    "qwen3-4b": ("4.02", "4.02"),
    "qwen3-8b": ("8.19", "8.19"),
    "qwen3-14b": ("14.77", "14.77"),
    "qwen3-32b": ("32.76", "32.76"),
    "qwen3-30b-a3b": ("30.5", "3.4"),
    "qwen3-235b-a22b": ("235", "22"),
    "mixtral-8x7b": ("46.7", "12.9"),
    "deepseek-v3": ("671", "38"),
}


def model_name(recipe: str) -> str:
    return recipe.rsplit("-", 1)[0]


def shape_of(hf: dict) -> ModelShape:
    return find_family(hf).shape(hf)


def resolved(name: str) -> tuple[JobConfig, ModelShape, ParallelLayout]:
    job = load_job(recipe_path(name))
    shape = shape_of(read_hf_config(job.model))
    assert job.cluster.nproc_per_node is not None
    world_size = job.cluster.nnodes * job.cluster.nproc_per_node
    return job, shape, ParallelLayout.resolve(job.parallel, world_size, shape.is_moe)


def test_the_models_that_are_promised_are_there():
    assert {model_name(name) for name in list_recipes()} == set(PUBLISHED)


@pytest.mark.parametrize("name", list_recipes())
def test_layout_is_valid_and_on_the_stated_number_of_gpus(name):
    job, shape, layout = resolved(name)
    require_valid(
        layout,
        shape,
        sequence_length=job.data.sequence_length,
        micro_batch_size=job.train.micro_batch_size,
        global_batch_size=job.train.global_batch_size,
    )
    assert name.endswith(f"-{layout.world_size}gpu") and 8 <= layout.world_size <= 1024
    assert job.data.sequence_length <= shape.max_position_embeddings
    assert job.schedule.warmup_steps < job.train.steps / 10


@pytest.mark.parametrize("name", list_recipes())
def test_tensor_and_context_groups_stay_inside_a_node(name):
    job, _, layout = resolved(name)
    places = place_ranks(layout, [job.cluster.nproc_per_node] * job.cluster.nnodes)
    assert crossing_groups(layout, places, "tp") == crossing_groups(layout, places, "cp") == ()
    assert crossing_groups(layout, places, "etp") == ()


@pytest.mark.parametrize("name", list_recipes())
def test_what_must_be_in_memory_leaves_room_for_activations(name):
    """bf16 weights 2, fp32 gradients 4, and 12 bytes of optimizer state a parameter shared over the replicas."""
    job, shape, layout = resolved(name)
    assert job.parallel.use_distributed_optimizer
    experts = 0
    if shape.is_moe:
        per_expert = 3 * shape.hidden_size * shape.moe_ffn_hidden_size
        experts = shape.num_moe_layers * shape.num_experts * per_expert
    dense = (shape.num_parameters() - experts) / (layout.tp * layout.pp)
    experts_here = experts / (layout.expert_tp * layout.ep * layout.pp)
    optimizer = 12 * (dense / (layout.dp * layout.cp) + experts_here / layout.expert_dp)
    assert (6 * (dense + experts_here) + optimizer) / 2**30 < 0.65 * MEMORY_GIB


@pytest.mark.parametrize("name", list_recipes())
def test_parameter_counts_are_the_published_ones(name):
    _, shape, _ = resolved(name)
    for count, published in zip(
        (shape.num_parameters(), shape.num_active_parameters()), PUBLISHED[model_name(name)], strict=True
    ):
        digits = len(published.partition(".")[2])
        assert f"{count / 1e9:.{digits}f}" == published


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(PUBLISHED))
def test_parameter_counts_are_transformers(model):
    """The geometry in the recipe is the real model's: transformers builds it (without memory) with as many."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    name = next(name for name in list_recipes() if model_name(name) == model)
    hf = read_recipe(name)["model"]["config"]
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf))
    count = sum(p.numel() for p in built.parameters())
    count += sum(b.numel() for n, b in built.named_buffers() if n.endswith("e_score_correction_bias"))
    assert shape_of(hf).num_parameters() == count


@pytest.mark.parametrize("name", list_recipes())
def test_families_that_are_trained_go_to_the_engine_and_others_are_refused(name):
    hf = read_recipe(name)["model"]["config"]
    family, says_so = find_family(hf), "Not runnable yet" in recipe_path(name).read_text()
    assert family.name == hf["model_type"]
    assert family.complete(hf)["num_hidden_layers"] == hf["num_hidden_layers"]
    assert len(family.rows(hf)) > 5
    if family.name in NOT_TRAINED:
        with pytest.raises(JobError, match="not trained yet") as refused:
            resolve(load_job(recipe_path(name)), nproc_per_node=8, on_cuda=True, output="unused")
        assert refused.value.key == "model.config.model_type" and says_so
    else:
        family.require_trainable()
        assert not says_so


@pytest.mark.parametrize("name", [n for n in list_recipes() if "-a" in n])
def test_mixtures_are_pretrained_with_their_balancing_loss(name):
    hf = read_recipe(name)["model"]["config"]
    assert find_family(hf).transformer_config(hf)["moe_aux_loss_coeff"] > 0


def test_list_shows_every_recipe_once():
    listed = list_verb(ListOptions())
    assert [r["name"] for r in listed["recipes"]] == list(list_recipes())
    json.dumps(listed)
    text = render_list(listed).splitlines()
    assert sum(line.startswith("llama-3.1-70b-512gpu ") for line in text) == 1
    assert "tp4+sp pp4 vpp5 cp2 dp16" in "\n".join(text) and "'mixtral' is not trained yet" in "\n".join(text)
    assert {r["model_type"] for r in listed["recipes"] if not r["supported"]} == NOT_TRAINED


def test_smaller_models_and_fewer_gpus_come_first():
    names = list_recipes()
    assert names.index("llama-3.1-8b-64gpu") < names.index("llama-3.1-70b-64gpu") < names.index("llama-3.1-70b-512gpu")


def test_show_prints_the_file():
    shown = show_verb(ShowOptions(name="qwen3-8b-32gpu"))
    json.dumps(shown)
    assert render_show(shown) + "\n" == recipe_path("qwen3-8b-32gpu").read_text()
    assert shown["job"]["cluster"] == {"nnodes": 4, "nproc_per_node": 8, "accelerator": "gpu"}


def test_an_unknown_name_is_refused_with_the_nearest():
    assert recipe_path("nothing-like-it") is None
    with pytest.raises(JobError, match="qwen3-8b-32gpu"):
        read_recipe("qwen3-8b-32gp")


def test_listing_needs_no_heavy_library():
    code = (
        "import sys; from swift_dist.recipes import *; render_list(list_verb(ListOptions()));"
        "print(sorted({'torch', 'ray', 'transformers', 'megatron'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
