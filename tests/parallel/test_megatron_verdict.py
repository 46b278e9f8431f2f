"""Our verdict on a layout equals megatron-core's own, for every layout of up to 16 ranks and a few model shapes.

megatron-core's verdict is what its code raises: `initialize_model_parallel` on a process group that only pretends to
communicate (torch's "fake" backend, one process), `TransformerConfig` and `GPTModel` built on the meta device for all
chunks of the first and the last pipeline stage, `MoELayer.forward` up to routing, the micro-batch calculator, the
interleaved schedule up to its first message, the context-parallel slice of a batch and the sequence-parallel split of
its activations.

What one verdict does not depend on is asked once: the model is built once per (tp, ep, etp, pp, vpp, sequence
parallel) and shape, since neither the world size nor cp appears in any of its checks except in stock
DotProductAttention, which refuses cp and which the engine replaces.
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from itertools import product
from math import lcm
from types import SimpleNamespace

import pytest

from swift_dist.parallel import AXES, ModelShape, ParallelLayout, check_layout, rules
from swift_dist.parallel.rules import Batch

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
        num_layers=8,
        hidden_size=16,
        num_attention_heads=8,
        num_query_groups=4,
        head_dim=2,
        ffn_hidden_size=7,  # of no plain MLP: must not matter
        vocab_size=300,
        num_experts=12,
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
REFUSALS = (AssertionError, ValueError, RuntimeError)


class Accepted(Exception):
    """Raised where megatron-core has passed its last check, so that nothing is computed or sent."""


def refusal(error: Exception) -> str:
    """The reason; an error of this machine (no CUDA) is none."""
    if "CUDA" in str(error) or "cuda" in str(error):
        raise error
    return str(error) or repr(error)


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
    """megatron-core on CPU, without communication; torch is as it was afterwards."""
    import torch
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    def norm(cls, config, hidden_size, **_):
        return torch.nn.RMSNorm(hidden_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
        patch.setattr(torch.cuda, "Stream", lambda *a, **k: SimpleNamespace())
        patch.setattr(torch.Tensor, "cuda", lambda self: self)  # tied embeddings are summed over their two stages
        patch.setattr(WrappedTorchNorm, "__new__", norm)  # stock: refuses sequence parallelism without TE
        oracle = Megatron()
        yield oracle
        oracle.close()


class Megatron:
    """megatron-core's verdicts; each method returns why it refuses, or None."""

    def __init__(self) -> None:
        self.model = cache(self._model)
        self.schedule = cache(self._schedule)
        self.sequence = cache(self._sequence)

    @staticmethod
    def open(layout: ParallelLayout, rank: int = 0) -> str | None:
        """initialize_model_parallel as one rank of a pretended world. Leaves the groups open if it accepts."""
        import torch.distributed as dist
        from megatron.core import parallel_state
        from torch.testing._internal.distributed.fake_pg import FakeStore

        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
        try:
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=layout.tp,
                pipeline_model_parallel_size=layout.pp,
                virtual_pipeline_model_parallel_size=layout.vpp,
                context_parallel_size=layout.cp,
                expert_model_parallel_size=layout.ep,
                expert_tensor_parallel_size=layout.etp,
                create_gloo_process_groups=False,
            )
        except REFUSALS as error:
            return refusal(error)
        return None

    def close(self) -> None:
        import torch.distributed as dist
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _model(self, name: str, layout: ParallelLayout) -> str | None:
        """`layout` here carries the smallest world for its degrees and cp = 1."""
        import torch
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
        from megatron.core.transformer.moe.moe_layer import MoELayer

        shape = SHAPES[name]
        num_moe_layers = 0
        stages = {0, layout.pp - 1}
        chunks = [None] if layout.vpp is None else list(range(layout.vpp))
        for stage, vp_stage in product(sorted(stages), chunks):
            assert self.open(layout, rank=layout.rank(pp=stage)) is None
            try:
                with torch.device("meta"):
                    config = transformer_config(shape, layout)
                    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=vp_stage)
                    model = GPTModel(
                        config,
                        spec,
                        vocab_size=shape.padded_vocab_size(layout.tp),
                        max_sequence_length=128,
                        position_embedding_type="rope",
                        share_embeddings_and_output_weights=shape.tie_embeddings,
                        pre_process=stage == 0 and vp_stage in (None, 0),
                        post_process=stage == layout.pp - 1 and vp_stage in (None, chunks[-1]),
                        vp_stage=vp_stage,
                    )
                    for layer in (m for m in model.modules() if isinstance(m, MoELayer)):
                        num_moe_layers += 1
                        layer.route = _accept
                        with pytest.raises(Accepted):
                            layer.train()(torch.zeros(4, 1, shape.hidden_size))
            except REFUSALS as error:
                return refusal(error)
        assert bool(num_moe_layers) == shape.is_moe, "the expert checks were reached"
        return None

    @staticmethod
    def num_micro_batches(layout: ParallelLayout, batch: Batch) -> int | str:
        from megatron.core.num_microbatches_calculator import ConstantNumMicroBatchesCalculator

        try:
            return ConstantNumMicroBatchesCalculator(
                batch.global_batch_size, batch.micro_batch_size, layout.dp, False, rank=0
            ).get()
        except REFUSALS as error:
            return refusal(error)

    def _schedule(self, pp: int, vpp: int, num_micro_batches: int) -> str | None:
        """The interleaved schedule, up to where it first looks at the model's type."""
        import torch
        from megatron.core.pipeline_parallel import schedules

        layout = ParallelLayout(world_size=pp, pp=pp, vpp=vpp)
        assert self.open(layout) is None
        chunk = torch.nn.Identity()
        chunk.config = transformer_config(None, layout)
        with pytest.MonkeyPatch.context() as patch, _on_cpu_mode():
            patch.setattr(schedules, "get_model_type", _accept)
            try:
                schedules.forward_backward_pipelining_with_interleaving(
                    forward_step_func=None,
                    data_iterator=[None] * vpp,
                    model=[chunk] * vpp,
                    num_microbatches=num_micro_batches,
                    seq_length=8,
                    micro_batch_size=1,
                )
            except Accepted:
                return None
            except REFUSALS as error:
                return refusal(error)
        raise AssertionError("unreachable: the schedule neither refused nor went on")

    def _sequence(self, layout: ParallelLayout, length: int) -> str | None:
        import torch
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
        from megatron.core.utils import get_batch_on_this_cp_rank

        assert self.open(layout) is None
        group = parallel_state.get_context_parallel_group()
        try:
            batch = get_batch_on_this_cp_rank({"tokens": torch.zeros(1, length)}, cp_group=group)
            if layout.sequence_parallel:
                scatter_to_sequence_parallel_region(
                    batch["tokens"].T.unsqueeze(-1), group=parallel_state.get_tensor_model_parallel_group()
                )
        except REFUSALS as error:
            return refusal(error)
        return None

    def verdict(self, name: str, layout: ParallelLayout, batch: Batch) -> str | None:
        """Of a layout whose grid was accepted."""
        smallest = lcm(layout.tp, layout.expert_tp * layout.ep) * layout.pp
        reason = self.model(name, layout.replace(world_size=smallest, cp=1))
        if reason:
            return reason
        num_micro_batches = self.num_micro_batches(layout, batch)
        if isinstance(num_micro_batches, str):
            return num_micro_batches
        if layout.vpp is not None:
            reason = self.schedule(layout.pp, layout.vpp, num_micro_batches)
            if reason:
                return reason
        plain = layout.replace(world_size=layout.tp * layout.cp, pp=1, vpp=None, ep=1, etp=layout.tp)
        return self.sequence(plain, batch.sequence_length)


def _accept(*_, **__):
    raise Accepted


def _on_cpu_mode():
    import torch

    class Mode(torch.overrides.TorchFunctionMode):
        """Tensors that megatron-core makes with device="cuda" are made on the CPU."""

        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            if kwargs.get("device") == "cuda":
                kwargs["device"] = "cpu"
            return function(*args, **kwargs)

    return Mode()


def transformer_config(shape: ModelShape | None, layout: ParallelLayout):
    import torch
    from megatron.core.transformer import TransformerConfig

    if shape is None:  # the schedule's checks need no model
        model = {"num_layers": layout.pp * (layout.vpp or 1), "hidden_size": 8, "num_attention_heads": 2}
    else:
        model = {
            "num_layers": shape.num_layers,
            "hidden_size": shape.hidden_size,
            "num_attention_heads": shape.num_attention_heads,
            "num_query_groups": shape.num_query_groups,
            "kv_channels": shape.head_dim,
            "ffn_hidden_size": shape.ffn_hidden_size,
            "gated_linear_unit": shape.gated_mlp,
            "qk_layernorm": shape.qk_norm,
            "add_qkv_bias": shape.qkv_bias,
            "add_bias_linear": False,
        }
    if shape is not None and shape.is_moe:
        model |= {
            "num_moe_experts": shape.num_experts,
            "moe_router_topk": shape.moe_top_k,
            "moe_ffn_hidden_size": shape.moe_ffn_hidden_size,
            "moe_shared_expert_intermediate_size": shape.shared_expert_ffn_hidden_size,
            "moe_layer_freq": [0] * shape.num_dense_layers + [1] * shape.num_moe_layers,
            "moe_token_dispatcher_type": "alltoall",
        }
    return TransformerConfig(
        **model,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        sequence_parallel=layout.sequence_parallel,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=False,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("most", "num_refused", "num_accepted"), [(6, 4228, 188), pytest.param(16, 98008, 1960, marks=pytest.mark.slow)]
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
                theirs = megatron.verdict(name, layout, batch)
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
