"""Layouts: defaults, nearest valid ones, the error that names them, and ranks on nodes."""

from __future__ import annotations

from math import log2

import pytest

from swift_dist.config import ParallelSection
from swift_dist.config.load import load_job
from swift_dist.errors import JobError
from swift_dist.parallel import (
    ModelShape,
    ParallelLayout,
    check_layout,
    crossing_groups,
    nearest_layouts,
    place_ranks,
    require_valid,
)
from swift_dist.parallel.nearest import distance

DENSE = ModelShape(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    ffn_hidden_size=14336,
    vocab_size=128256,
)
MOE = ModelShape(
    num_layers=8,
    hidden_size=64,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=8,
    ffn_hidden_size=128,
    vocab_size=1000,
    num_experts=8,
    moe_top_k=2,
    moe_ffn_hidden_size=96,
)
BATCH = {"sequence_length": 4096, "micro_batch_size": 1, "global_batch_size": 64}


def rules(layout: ParallelLayout, shape: ModelShape = DENSE, **changes) -> list[str]:
    return [v.rule for v in check_layout(layout, shape, **{**BATCH, **changes})]


def test_resolve_fills_the_defaults():
    section = ParallelSection(tensor_model_parallel_size=2, expert_model_parallel_size=2)
    moe = ParallelLayout.resolve(section, world_size=8, is_moe=True)
    dense = ParallelLayout.resolve(section, world_size=8, is_moe=False)
    assert (moe.etp, moe.sequence_parallel) == (2, True)
    assert (dense.etp, dense.sequence_parallel) == (2, False)
    assert (moe.dp, moe.expert_dp) == (4, 2)
    off = ParallelSection(tensor_model_parallel_size=2, sequence_parallel=False, expert_tensor_parallel_size=1)
    layout = ParallelLayout.resolve(off, world_size=8, is_moe=True)
    assert (layout.etp, layout.sequence_parallel) == (1, False)
    assert rules(layout, MOE) == ["moe_tp_needs_sequence_parallel"]


def test_a_degree_below_one_is_no_layout():
    with pytest.raises(ValueError, match="cp must be at least 1"):
        ParallelLayout(world_size=4, cp=0)


def test_coordinates_and_rank_are_inverse():
    layout = ParallelLayout(world_size=48, tp=2, cp=3, pp=2)
    for rank in range(48):
        place = layout.coordinates(rank)
        assert layout.rank(tp=place.tp, cp=place.cp, dp=place.dp, pp=place.pp) == rank
    with pytest.raises(ValueError, match="outside a world of 48"):
        layout.coordinates(48)


def test_rules_of_our_own_say_so():
    layout = ParallelLayout(world_size=4, tp=2, etp=1)
    (violation,) = check_layout(layout, DENSE, **BATCH)
    assert (violation.rule, violation.origin) == ("etp_needs_experts", "swift_dist")
    assert violation.key == "parallel.expert_tensor_parallel_size"


@pytest.mark.parametrize(
    ("layout", "shape", "batch", "broken"),
    [
        (ParallelLayout(world_size=2, tp=2), DENSE, {}, 0),
        (ParallelLayout(world_size=2, tp=2), DENSE, {"sequence_length": 24}, 1),  # tokens
        (ParallelLayout(world_size=1), MOE, {}, 0),
        (
            ParallelLayout(world_size=8, tp=8, sequence_parallel=True),
            MOE,
            {},
            2,
        ),  # 8 attention outputs, 12 expert width
    ],
)
def test_fp8_needs_multiples_of_sixteen(layout, shape, batch, broken):
    assert "fp8_dimensions" not in rules(layout, shape, **batch)
    found = rules(layout, shape, **batch, fp8=True)
    assert found.count("fp8_dimensions") == broken


def test_nearest_of_the_same_world_size_come_first():
    wanted = ParallelLayout(world_size=8, tp=3)
    near = nearest_layouts(wanted, DENSE, **BATCH)
    assert [n.tp for n in near[:2]] == [4, 2]
    assert all(n.world_size == 8 and not rules(n) for n in near)
    distances = [distance(wanted, n) for n in near]
    assert distances == sorted(distances) and distances[0] == pytest.approx(log2(4 / 3))


def test_nearest_is_nearest_among_all():
    """Against a search over every layout of the world size."""
    wanted = ParallelLayout(world_size=16, tp=4, pp=3, ep=5, sequence_parallel=True)
    sizes = (1, 2, 4, 8, 16)
    possible = [
        ParallelLayout(world_size=16, tp=tp, pp=pp, cp=cp, ep=ep, etp=etp, sequence_parallel=tp > 1)
        for tp in sizes
        for pp in sizes
        for cp in sizes
        for ep in sizes
        for etp in {1, tp}
    ]
    best = min(distance(wanted, p) for p in possible if not rules(p, MOE))
    near = nearest_layouts(wanted, MOE, **BATCH, count=5)
    assert distance(wanted, near[0]) == pytest.approx(best)
    assert len(near) == len(set(near)) == 5 and not any(rules(n, MOE) for n in near)


def test_other_world_sizes_fill_the_list_nearest_first():
    wanted = ParallelLayout(world_size=7)
    near = nearest_layouts(wanted, DENSE, **{**BATCH, "global_batch_size": 8})
    assert [n.world_size for n in near] == [8, 8, 8] and near[0] == ParallelLayout(world_size=8)


def test_a_possible_layout_passes():
    require_valid(ParallelLayout(world_size=8, tp=2, pp=2), DENSE, **BATCH)


def test_the_error_names_rule_key_value_and_what_to_paste(tmp_path):
    with pytest.raises(JobError) as refused:
        require_valid(ParallelLayout(world_size=8, tp=8, pp=1, vpp=2), MOE, **BATCH)
    error = refused.value
    assert error.key == "parallel.virtual_pipeline_model_parallel_size"
    assert "[rule vpp_needs_pp]" in error.message and "[rule moe_tp_needs_sequence_parallel]" in error.message
    flags = [line.strip() for line in error.remedy.splitlines()[1:]]
    assert len(flags) == 3
    for line in flags:  # each line repairs the job it is pasted behind
        file = tmp_path / "job.yaml"
        file.write_text(
            "parallel: {tensor_model_parallel_size: 8, virtual_pipeline_model_parallel_size: 2, "
            "sequence_parallel: false}"
        )
        job = load_job(file, line.split("  (on")[0].split())
        assert rules(ParallelLayout.resolve(job.parallel, 8, is_moe=True), MOE) == []


def test_where_no_layout_helps_the_error_says_what_would():
    with pytest.raises(JobError) as refused:
        require_valid(ParallelLayout(world_size=4), DENSE, **{**BATCH, "global_batch_size": 9, "micro_batch_size": 2})
    assert refused.value.key == "train.global_batch_size"
    assert "8 or 16" in refused.value.message and "change train.global_batch_size" in refused.value.remedy


@pytest.mark.parametrize("axis", ["tp", "cp", "ep", "etp"])
def test_groups_stay_in_a_node_where_they_fit(axis):
    layout = ParallelLayout(world_size=32, tp=2, cp=4, pp=2, ep=4, etp=2)
    places = place_ranks(layout, [8, 8, 8, 8])
    assert [p.node for p in places] == [n for n in range(4) for _ in range(8)]
    assert crossing_groups(layout, places, axis) == ()
    assert crossing_groups(layout, places, "pp") != ()


def test_uneven_nodes_do_not_split_tensor_parallel_groups():
    """3 + 5 slots, as a shrunk cluster has: filling in rank order would cut a pair in two."""
    layout = ParallelLayout(world_size=6, tp=2)
    places = place_ranks(layout, [3, 5])
    assert [p.node for p in places] == [0, 0, 1, 1, 1, 1]
    assert [p.local_rank for p in places] == [0, 1, 0, 1, 2, 3]
    assert crossing_groups(layout, places, "tp") == ()


def test_a_group_larger_than_a_node_crosses_and_is_named():
    layout = ParallelLayout(world_size=8, tp=8)
    places = place_ranks(layout, [4, 4])
    assert crossing_groups(layout, places, "tp") == (tuple(range(8)),)


def test_context_groups_give_way_before_tensor_groups():
    layout = ParallelLayout(world_size=8, tp=2, cp=4)
    places = place_ranks(layout, [4, 4])
    assert crossing_groups(layout, places, "tp") == ()
    assert len(crossing_groups(layout, places, "cp")) == 2


def test_too_few_slots():
    with pytest.raises(ValueError, match="8 ranks need as many slots, the nodes have 6"):
        place_ranks(ParallelLayout(world_size=8), [3, 3])
