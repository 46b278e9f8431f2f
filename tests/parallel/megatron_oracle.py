"""megatron-core's own verdict on a layout: what its code raises, asked in one process without communication.

Which code: `initialize_model_parallel` on a process group that only pretends to communicate (torch's "fake" backend),
`TransformerConfig` and `GPTModel` built on the meta device for all chunks of the first and the last pipeline stage,
`MoELayer.forward` up to routing, the micro-batch calculator, the interleaved schedule up to its first message, the
context-parallel slice of a batch and the sequence-parallel split of its activations.

What a verdict does not depend on is asked once: the model is built once per (tp, ep, etp, pp, vpp, sequence parallel)
and shape, since neither the world size nor cp appears in any of its checks except in stock DotProductAttention, which
refuses cp and which the engine replaces.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from math import lcm
from types import SimpleNamespace

import pytest

from swift_dist.parallel import ModelShape, ParallelLayout
from swift_dist.parallel.rules import Batch

REFUSALS = (AssertionError, ValueError, RuntimeError)


class Accepted(Exception):
    """Raised where megatron-core has passed its last check, so that nothing is computed or sent."""


def refusal(error: Exception) -> str:
    """The reason; an error of this machine (no CUDA) is none."""
    if "CUDA" in str(error) or "cuda" in str(error):
        raise error
    return str(error) or repr(error)


@contextmanager
def megatron_on_cpu() -> Iterator[Megatron]:
    """megatron-core on CPU, without communication; torch is as it was afterwards."""
    import torch
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    def norm(cls, config, hidden_size, **_):
        return torch.nn.RMSNorm(hidden_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
        patch.setattr(torch.cuda, "Stream", lambda *a, **k: SimpleNamespace())
        # the class keeps the first stream it makes, for every model that this process builds later
        patch.setattr(MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", None)
        patch.setattr(torch.Tensor, "cuda", lambda self: self)  # tied embeddings are summed over their two stages
        patch.setattr(WrappedTorchNorm, "__new__", norm)  # stock: refuses sequence parallelism without TE
        oracle = Megatron()
        try:
            yield oracle
        finally:
            oracle.close()


class Megatron:
    """megatron-core's verdicts; each method returns why it refuses, or None."""

    def __init__(self) -> None:
        self._opened: tuple[ParallelLayout, int] | None = None
        self.model = cache(self._model)
        self.schedule = cache(self._schedule)
        self.sequence = cache(self._sequence)

    def open(self, layout: ParallelLayout, rank: int = 0) -> str | None:
        """initialize_model_parallel as one rank of a pretended world. Leaves the groups open if it accepts."""
        wanted = (layout.replace(sequence_parallel=False), rank)  # sequence parallelism makes no groups
        if self._opened == wanted:
            return None
        self._opened = None
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
        self._opened = wanted
        return None

    def close(self) -> None:
        import torch.distributed as dist
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _model(self, shape: ModelShape, layout: ParallelLayout) -> str | None:
        """`layout` here carries the smallest world for its degrees and cp = 1."""
        import torch
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
        from megatron.core.transformer.moe.moe_layer import MoELayer

        try:
            config = transformer_config(shape, layout)
        except REFUSALS as error:
            return refusal(error)
        num_moe_layers = 0
        stages = {0, layout.pp - 1}
        chunks = [None] if layout.vpp is None else list(range(layout.vpp))
        for stage, vp_stage in product(sorted(stages), chunks):
            assert self.open(layout, rank=layout.rank(pp=stage)) is None
            try:
                with torch.device("meta"):
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

    def verdict(self, shape: ModelShape, layout: ParallelLayout, batch: Batch) -> str | None:
        """Of a layout whose grid was accepted."""
        smallest = lcm(layout.tp, layout.expert_tp * layout.ep) * layout.pp
        reason = self.model(shape, layout.replace(world_size=smallest, cp=1))
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
