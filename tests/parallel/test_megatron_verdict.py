"""Our verdict on a layout equals megatron-core's own, for every layout of up to 16 ranks and a few model shapes."""

from __future__ import annotations

import inspect
import re
from itertools import product

import pytest

from swift_dist.parallel import AXES, ModelShape, ParallelLayout, check_layout, rules
from swift_dist.parallel.rules import Batch
from tests.parallel.megatron_oracle import megatron_on_cpu

pytest.importorskip("megatron.core")

MOST_RANKS = 16
VIRTUAL = (None, 2, 3, 4)
SHAPES = {
    "dense": ModelShape(
        num_layers=12,
        hidden_size=24,
        num_attention_heads=12,
        num_query_groups=12,
        head_dim=4,
        ffn_hidden_size=40,
        vocab_size=300,
    ),
    "few query groups": ModelShape(
        num_layers=8,
        hidden_size=16,
        num_attention_heads=16,
        num_query_groups=2,
        head_dim=2,
        ffn_hidden_size=48,
        vocab_size=300,
        qk_norm=True,
        tie_embeddings=True,
    ),
    "three query groups": ModelShape(
        num_layers=6,
        hidden_size=24,
        num_attention_heads=12,
        num_query_groups=3,
        head_dim=4,
        ffn_hidden_size=72,
        vocab_size=300,
        qkv_bias=True,
        gated_mlp=False,
    ),
    "moe": ModelShape(
        num_layers=4,
        hidden_size=16,
        num_attention_heads=8,
        num_query_groups=4,
        head_dim=2,
        ffn_hidden_size=7,  # of no plain MLP: must not matter
        vocab_size=300,
        num_experts=6,
        moe_top_k=2,
        moe_ffn_hidden_size=24,
    ),
    "moe, shared experts, one plain layer": ModelShape(
        num_layers=6,
        hidden_size=24,
        num_attention_heads=12,
        num_query_groups=6,
        head_dim=2,
        ffn_hidden_size=36,
        vocab_size=300,
        num_experts=8,
        moe_top_k=2,
        moe_ffn_hidden_size=10,
        shared_expert_ffn_hidden_size=20,
        num_dense_layers=1,
    ),
}
BATCHES = (Batch(96, 1, 48), Batch(40, 2, 32))


def degrees(most: int):
    """Every (tp, pp, cp, ep, etp) with tp * pp * cp <= most and etp * ep * pp <= most."""
    sizes = range(1, most + 1)
    for pp in sizes:
        dense = [(tp, cp) for tp, cp in product(sizes, sizes) if tp * cp * pp <= most]
        expert = [(ep, etp) for ep, etp in product(sizes, sizes) if ep * etp * pp <= most]
        for (tp, cp), (ep, etp) in product(dense, expert):
            yield {"tp": tp, "pp": pp, "cp": cp, "ep": ep, "etp": etp}


def worlds_of(most: int):
    for world_size in range(1, most + 1):
        for d in degrees(most):
            yield ParallelLayout(world_size=world_size, **d)


def our_refusals(layout: ParallelLayout, shape: ModelShape, batch: Batch) -> list[str]:
    found = check_layout(
        layout,
        shape,
        sequence_length=batch.sequence_length,
        micro_batch_size=batch.micro_batch_size,
        global_batch_size=batch.global_batch_size,
    )
    return [v.rule for v in found if v.origin == "megatron"]


@pytest.fixture(scope="module")
def megatron():
    with megatron_on_cpu() as oracle:
        yield oracle


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("most", "num_refused", "num_accepted"), [(6, 2587, 209), pytest.param(16, 98008, 1960, marks=pytest.mark.slow)]
)
def test_every_grid(megatron, most, num_refused, num_accepted):
    """World size against degrees: whatever the model, the same grids are refused."""
    world_rules = {"world_divisible_dense", "world_divisible_expert", "vpp_needs_pp"}
    any_shape, any_batch = SHAPES["moe"], BATCHES[0]
    refused = accepted = 0
    for grid in worlds_of(most):
        for vpp in (None, 2):
            layout = grid.replace(vpp=vpp)
            ours = world_rules & set(our_refusals(layout, any_shape, any_batch))
            theirs = megatron.open(layout)
            assert bool(ours) == bool(theirs), f"{layout}: ours {ours}, megatron-core {theirs}"
            refused, accepted = refused + bool(theirs), accepted + (not theirs)
    assert (refused, accepted) == (num_refused, num_accepted), "the enumeration is not what it says"


def possible_grids(most: int):
    for grid in worlds_of(most):
        dense, expert = grid.tp * grid.cp * grid.pp, grid.expert_tp * grid.ep * grid.pp
        if grid.world_size % dense == 0 and grid.world_size % expert == 0:
            yield grid


def compare(megatron, name: str, most: int) -> tuple[int, int]:
    shape = SHAPES[name]
    counts = {True: 0, False: 0}
    for grid in possible_grids(most):
        for vpp, sequence_parallel in product(VIRTUAL if grid.pp > 1 else (None,), (False, True)):
            layout = grid.replace(vpp=vpp, sequence_parallel=sequence_parallel)
            for batch in BATCHES:
                ours = our_refusals(layout, shape, batch)
                theirs = megatron.verdict(shape, layout, batch)
                assert bool(ours) == bool(theirs), f"{name}, {layout}, {batch}: ours {ours}, megatron-core {theirs}"
                counts[bool(theirs)] += 1
    print(f"{name}: {counts[True]} layouts refused by both, {counts[False]} accepted by both")
    return counts[True], counts[False]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SHAPES)
def test_every_layout_of_up_to_4_ranks(megatron, name):
    refused, accepted = compare(megatron, name, most=4)
    assert refused and accepted


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SHAPES)
def test_every_layout_of_up_to_16_ranks(megatron, name):
    refused, accepted = compare(megatron, name, most=MOST_RANKS)
    assert refused and accepted


def test_every_rule_is_put_to_the_test():
    """Each rule is, for some layout above, the only one that refuses it: without it the verdicts would differ."""
    decisive = set()
    for shape, grid in product(SHAPES.values(), possible_grids(MOST_RANKS)):
        for vpp, sequence_parallel in product(VIRTUAL if grid.pp > 1 else (None,), (False, True)):
            layout = grid.replace(vpp=vpp, sequence_parallel=sequence_parallel)
            for batch in BATCHES:
                ours = our_refusals(layout, shape, batch)
                decisive.update(ours if len(ours) == 1 else ())
    for grid in worlds_of(4):  # as test_every_grid: what no possible grid can break
        for vpp in (None, 2):
            ours = our_refusals(grid.replace(vpp=vpp), SHAPES["dense"], Batch(96, 1, 48))
            decisive.update(ours if len(ours) == 1 else ())
    source = inspect.getsource(rules)
    stated = set(re.findall(r'Violation\(\s*"(\w+)"', source)) - {"etp_needs_experts", "fp8_dimensions"}
    assert len(stated) > 15 and decisive == stated


@pytest.mark.parametrize("most", [8, pytest.param(MOST_RANKS, marks=pytest.mark.slow)])
def test_groups_are_those_of_rank_generator(most):
    """`groups` and so `coordinates` against parallel_state.RankGenerator, megatron-core's own rank arithmetic."""
    from megatron.core.parallel_state import RankGenerator

    order = "tp-cp-ep-dp-pp"
    for layout in possible_grids(most):
        dense = RankGenerator(tp=layout.tp, ep=1, dp=layout.dp, pp=layout.pp, cp=layout.cp, order=order)
        expert = RankGenerator(tp=layout.etp, ep=layout.ep, dp=layout.expert_dp, pp=layout.pp, cp=1, order=order)
        theirs = {axis: dense.get_ranks(axis) for axis in ("tp", "cp", "dp", "pp")}
        theirs |= {"dp_cp": dense.get_ranks("dp-cp"), "ep": expert.get_ranks("ep")}
        theirs |= {"etp": expert.get_ranks("tp"), "expert_dp": expert.get_ranks("dp")}
        for axis in AXES:
            ours = [list(group) for group in layout.groups(axis)]
            assert ours == sorted(theirs[axis]), f"{layout}: {axis}"
            index = axis if axis != "dp_cp" else None
            for group in theirs[axis] if index else ():
                assert [getattr(layout.coordinates(rank), index) for rank in group] == list(range(len(group)))
