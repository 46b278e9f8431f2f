"""Which layouts are possible: one small rule each for what megatron-core 0.16.1 (and transformer-engine) would refuse.

Every rule says where megatron-core enforces it; `tests/parallel/test_megatron_verdict.py` enumerates layouts and
compares. Rules of our own carry `origin="swift_dist"`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from swift_dist.parallel.layout import ParallelLayout
from swift_dist.parallel.shape import ModelShape

TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
VPP = "parallel.virtual_pipeline_model_parallel_size"
CP = "parallel.context_parallel_size"
EP = "parallel.expert_model_parallel_size"
ETP = "parallel.expert_tensor_parallel_size"
SP = "parallel.sequence_parallel"
SEQUENCE = "data.sequence_length"
GLOBAL_BATCH = "train.global_batch_size"
WORLD = "cluster.nproc_per_node"
FP8 = "train.fp8"

Origin = Literal["megatron", "transformer_engine", "swift_dist"]


@dataclass(frozen=True)
class Violation:
    """One broken rule.

    Args:
        rule: stable identifier, e.g. "heads_divisible_by_tp".
        key: dotted configuration key whose value is at fault.
        message: the value, what it must satisfy, and the values that are allowed where they can be listed.
        origin: who refuses: "megatron", "transformer_engine", or "swift_dist" (a rule of our own).
    """

    rule: str
    key: str
    message: str
    origin: Origin = "megatron"


@dataclass(frozen=True)
class Batch:
    """What one step feeds the model: tokens per sample, samples per forward pass and per step over all ranks; and
    whether matrix products run in FP8."""

    sequence_length: int
    micro_batch_size: int
    global_batch_size: int
    fp8: bool = False


Rule = Callable[[ParallelLayout, ModelShape, Batch], Iterator[Violation]]


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def multiples_around(number: int, factor: int) -> str:
    """The multiples of `factor` on both sides of `number`, as text."""
    below = number // factor * factor
    return " or ".join(str(m) for m in (below, below + factor) if m > 0)


def _list(numbers: list[int], most: int = 12) -> str:
    return ", ".join(map(str, numbers[:most])) + (", ..." if len(numbers) > most else "")


def _world_divisible_dense(layout: ParallelLayout, shape: ModelShape, batch: Batch) -> Iterator[Violation]:
    """parallel_state.initialize_model_parallel: RuntimeError unless world_size % (tp * cp * pp) == 0."""
    product = layout.tp * layout.cp * layout.pp
    if layout.world_size % product:
        yield Violation(
            "world_divisible_dense",
            WORLD,
            f"{layout.world_size} ranks cannot be split into tp {layout.tp} x cp {layout.cp} x pp {layout.pp} "
            f"= {product}; the number of ranks must be a multiple of {product}: "
            f"{multiples_around(layout.world_size, product)}",
        )


def _world_divisible_expert(layout: ParallelLayout, shape: ModelShape, batch: Batch) -> Iterator[Violation]:
    """parallel_state.initialize_model_parallel: RuntimeError unless world_size % (etp * ep * pp) == 0."""
    product = layout.expert_tp * layout.ep * layout.pp
    implied = layout.expert_tp == layout.tp and layout.ep == 1  # by the dense rule
    if layout.world_size % product and not implied:
        yield Violation(
            "world_divisible_expert",
            EP,
            f"{layout.world_size} ranks cannot be split into etp {layout.expert_tp} x ep {layout.ep} x pp {layout.pp} "
            f"= {product}; the number of ranks must be a multiple of {product}: "
            f"{multiples_around(layout.world_size, product)}",
        )


def _heads_divisible_by_tp(layout: ParallelLayout, shape: ModelShape, batch: Batch) -> Iterator[Violation]:
    """TransformerConfig.__post_init__: ValueError."""
    if shape.num_attention_heads % layout.tp:
        yield Violation(
            "heads_divisible_by_tp",
            TP,
            f"{layout.tp} does not divide the model's {shape.num_attention_heads} attention heads; "
            f"allowed: {_list(divisors(shape.num_attention_heads))}",
        )


def _query_groups_fit_tp(layout: ParallelLayout, shape: ModelShape, batch: Batch) -> Iterator[Violation]:
    """TransformerConfig.__post_init__: ValueError unless one of (groups, tp) divides the other.

    With fewer groups than tp ranks megatron-core replicates keys and values: a rank then holds one group's.
    """
    groups = shape.num_query_groups
    if shape.latent_attention is None and groups % layout.tp and layout.tp % groups:
        yield Violation(
            "query_groups_fit_tp",
            TP,
            f"{layout.tp} is neither a divisor nor a multiple of the model's {groups} key/value heads; "
            f"allowed: {_list(divisors(groups))} or a multiple of {groups}",
        )


def _qkv_divisible_by_tp(layout: ParallelLayout, shape: ModelShape, batch: Batch) -> Iterator[Violation]:
    """ColumnParallelLinear: the joint query-key-value output, (heads + 2 * groups) * head_dim, is cut into tp parts.

    Only a question where keys and values are replicated (groups < tp); otherwise the two rules above imply it.
    """
    width = (shape.num_attention_heads + 2 * shape.num_query_groups) * shape.head_dim
    if shape.latent_attention is None and width % layout.tp:
        yield Violation(
            "qkv_divisible_by_tp",
            TP,
            f"{layout.tp} does not divide the query-key-value projection's {width} outputs "
            f"(({shape.num_attention_heads} + 2 x {shape.num_query_groups}) heads x {shape.head_dim})",
        )


def _ffn_divisible_by_tp(layout: ParallelLayout, shape: ModelShape, batch: Batch) -> Iterator[Violation]:
    """ColumnParallelLinear / RowParallelLinear of MLP: `divide` asserts. MoE models: their plain and shared MLPs."""
    widths = {}
    if shape.num_plain_mlp_layers:
        widths["MLP width"] = shape.ffn_hidden_size
    if shape.shared_expert_ffn_hidden_size is not None:
        widths["shared experts' width"] = shape.shared_expert_ffn_hidden_size
    for name, width in widths.items():
        if width % layout.tp:
            yield Violation(
                "ffn_divisible_by_tp",
                TP,
                f"{layout.tp} does not divide the {name} {width}; allowed: {_list(divisors(width))}",
            )


def _expert_ffn_divisible_by_etp(layout: ParallelLayout, shape: ModelShape, batch: Batch) -> Iterator[Violation]:
    """ColumnParallelLinear / RowParallelLinear of an expert's MLP: `divide` asserts over the expert TP group."""
    width = shape.moe_ffn_hidden_size
    if width is not None and width % layout.expert_tp:
        yield Violation(
            "expert_ffn_divisible_by_etp",
            ETP,
            f"{layout.expert_tp} does not divide the experts' width {width}; allowed: {_list(divisors(width))}",
        )


def _experts_divisible_by_ep(layout: ParallelLayout, shape: ModelShape, batch: Batch) -> Iterator[Violation]:
    """TransformerConfig: ValueError for ep > 1 without experts. BaseMoELayer: assert num_moe_experts % ep == 0."""
    if shape.num_experts is None:
        if layout.ep > 1:
            yield Violation("experts_divisible_by_ep", EP, f"{layout.ep}: the model has no experts; allowed: 1")
    elif shape.num_experts % layout.ep:
        yield Violation(
            "experts_divisible_by_ep",
            EP,
            f"{layout.ep} does not divide the model's {shape.num_experts} experts; "
            f"allowed: {_list(divisors(shape.num_experts))}",
        )


def _etp_needs_experts(layout: ParallelLayout, shape: ModelShape, batch: Batch) -> Iterator[Violation]:
    """Ours: megatron-core accepts any expert tensor parallel size for a dense model, and it does nothing."""
    if not shape.is_moe and layout.expert_tp != layout.tp:
        yield Violation(
            "etp_needs_experts",
            ETP,
            f"{layout.expert_tp}: the model has no experts, so it would do nothing; leave it out",
            "swift_dist",
        )


def _layers_divisible_by_pp(layout: ParallelLayout, shape: ModelShape, batch: Batch) -> Iterator[Violation]:
    """transformer_block.get_num_layers_to_build: assert num_layers % pp == 0, then layers per stage % vpp == 0."""
    layers = shape.num_layers
    if layers % layout.pp:
        yield Violation(
            "layers_divisible_by_pp",
            PP,
            f"{layout.pp} does not divide the model's {layers} layers; allowed: {_list(divisors(layers))}",
        )
    elif layout.vpp is not None and layout.pp > 1 and layers // layout.pp % layout.vpp:
        per_stage = layers // layout.pp
        yield Violation(
            "layers_divisible_by_vpp",
            VPP,
            f"{layout.vpp} does not divide the {per_stage} layers of a pipeline stage ({layers} layers / pp "
            f"{layout.pp}); allowed: {_list(divisors(per_stage)[1:]) or 'none, leave it out'}",
        )


def _vpp_needs_pp(layout: ParallelLayout, shape: ModelShape, batch: Batch) -> Iterator[Violation]:
    """parallel_state.initialize_model_parallel: RuntimeError unless pp > 1 with the interleaved schedule."""
    if layout.vpp is not None and layout.pp == 1:
        yield Violation("vpp_needs_pp", VPP, f"{layout.vpp} needs {PP} of at least 2 (it is 1); allowed: leave it out")


def _sequence_parallel_needs_tp(layout: ParallelLayout, shape: ModelShape, batch: Batch) -> Iterator[Violation]:
    """ModelParallelConfig.__post_init__: ValueError."""
    if layout.sequence_parallel and layout.tp == 1:
        yield Violation("sequence_parallel_needs_tp", SP, f"true needs {TP} of at least 2 (it is 1); allowed: false")


def _moe_tp_needs_sequence_parallel(layout: ParallelLayout, shape: ModelShape, batch: Batch) -> Iterator[Violation]:
    """MoELayer.forward: ValueError in training with tp > 1 and without sequence parallelism."""
    if shape.num_moe_layers and layout.tp > 1 and not layout.sequence_parallel:
        yield Violation(
            "moe_tp_needs_sequence_parallel",
            SP,
            f"false: a mixture of experts with tp {layout.tp} > 1 trains with sequence parallelism only; allowed: true",
        )


def _sequence_divisible(layout: ParallelLayout, shape: ModelShape, batch: Batch) -> Iterator[Violation]:
    """utils.get_batch_on_this_cp_rank views the sequence as 2 * cp chunks (rank r takes r and 2 * cp - 1 - r);
    tensor_parallel.mappings._split_along_first_dim asserts that what is left divides by tp under sequence parallelism.
    """
    length = batch.sequence_length
    if layout.cp > 1 and length % (2 * layout.cp):
        yield Violation(
            "sequence_divisible_by_cp",
            SEQUENCE,
            f"{length} must be a multiple of 2 x cp = {2 * layout.cp}: {multiples_around(length, 2 * layout.cp)}",
        )
    elif layout.sequence_parallel and length // layout.cp % layout.tp:
        factor = layout.cp * layout.tp * (2 if layout.cp > 1 and layout.tp % 2 else 1)
        yield Violation(
            "sequence_divisible_by_tp",
            SEQUENCE,
            f"{length} / cp {layout.cp} must be a multiple of tp {layout.tp} under sequence parallelism; "
            f"nearest: {multiples_around(length, factor)}",
        )


def _global_batch_divisible(layout: ParallelLayout, shape: ModelShape, batch: Batch) -> Iterator[Violation]:
    """num_microbatches_calculator: assert global batch % (micro batch * dp) == 0.
    forward_backward_pipelining_with_interleaving: at least pp micro-batches and a multiple of pp.
    """
    if layout.world_size % (layout.tp * layout.cp * layout.pp):
        return  # dp is undefined; the world-size rule has spoken
    unit = batch.micro_batch_size * layout.dp
    if batch.global_batch_size % unit:
        yield Violation(
            "global_batch_divisible",
            GLOBAL_BATCH,
            f"{batch.global_batch_size} must be a multiple of micro_batch_size {batch.micro_batch_size} x dp "
            f"{layout.dp} = {unit}: {multiples_around(batch.global_batch_size, unit)}",
        )
    elif layout.vpp is not None and batch.global_batch_size // unit % layout.pp:
        yield Violation(
            "vpp_micro_batches",
            GLOBAL_BATCH,
            f"{batch.global_batch_size} gives {batch.global_batch_size // unit} micro-batches per step; the "
            f"interleaved schedule needs a multiple of pp {layout.pp}: a global batch of "
            f"{multiples_around(batch.global_batch_size, unit * layout.pp)}",
        )


def _fp8_dimensions(layout: ParallelLayout, shape: ModelShape, batch: Batch) -> Iterator[Violation]:
    """transformer-engine: FP8 matrix products need both dimensions of every operand to be multiples of 16 (forward
    alone: 8 x 16); experts' token counts are padded by megatron-core, the output layer and router stay in bf16.
    """
    if not batch.fp8:
        return
    tokens = batch.sequence_length // layout.cp * batch.micro_batch_size
    dims = {"hidden size": shape.hidden_size, "tokens per forward pass (micro-batch x sequence / cp)": tokens}
    if shape.latent_attention is None:
        dims["query-key-value outputs per rank"] = (
            (shape.num_attention_heads + 2 * shape.num_query_groups) * shape.head_dim // layout.tp
        )
        dims["attention outputs per rank"] = shape.num_attention_heads * shape.head_dim // layout.tp
    if shape.num_plain_mlp_layers:
        dims["MLP width per rank"] = shape.ffn_hidden_size // layout.tp
    if shape.moe_ffn_hidden_size is not None:
        dims["expert width per rank"] = shape.moe_ffn_hidden_size // layout.expert_tp
    if shape.shared_expert_ffn_hidden_size is not None:
        dims["shared experts' width per rank"] = shape.shared_expert_ffn_hidden_size // layout.tp
    for name, size in dims.items():
        if size % 16:
            yield Violation(
                "fp8_dimensions", FP8, f"{name} is {size}, FP8 needs a multiple of 16", "transformer_engine"
            )


# The model's rules come first: "3 does not divide 32 heads" helps more than "3 does not divide 8 ranks".
RULES: tuple[Rule, ...] = (
    _heads_divisible_by_tp,
    _query_groups_fit_tp,
    _qkv_divisible_by_tp,
    _ffn_divisible_by_tp,
    _layers_divisible_by_pp,
    _vpp_needs_pp,
    _experts_divisible_by_ep,
    _etp_needs_experts,
    _expert_ffn_divisible_by_etp,
    _world_divisible_dense,
    _world_divisible_expert,
    _sequence_parallel_needs_tp,
    _moe_tp_needs_sequence_parallel,
    _sequence_divisible,
    _global_batch_divisible,
    _fp8_dimensions,
)


def check_layout(
    layout: ParallelLayout,
    shape: ModelShape,
    *,
    sequence_length: int,
    micro_batch_size: int,
    global_batch_size: int,
    fp8: bool = False,
) -> list[Violation]:
    """Every rule that the layout breaks for this model and batch; empty: the layout is possible.

    Args:
        layout: the degrees of parallelism.
        shape: the model's geometry.
        sequence_length: tokens per sample.
        micro_batch_size: samples per forward pass of one data-parallel rank.
        global_batch_size: samples per optimizer step over all ranks.
        fp8: matrix products run in FP8 through transformer-engine.
    """
    return broken_rules(layout, shape, Batch(sequence_length, micro_batch_size, global_batch_size, fp8))


def broken_rules(layout: ParallelLayout, shape: ModelShape, batch: Batch) -> list[Violation]:
    """`check_layout` for a batch that is already a value."""
    return [violation for rule in RULES for violation in rule(layout, shape, batch)]
