"""megatron-core's GPTModel with exact rotary frequencies and with vocabulary padding outside the softmax."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from swift_dist.engines.megatron.spec import block_spec
from swift_dist.models import Family
from swift_dist.parallel import ParallelLayout


class Model(GPTModel):
    """GPTModel whose vocabulary is padded for tensor parallelism without a trace in the numbers.

    Megatron stores a multiple of 128 * TP rows. Their logits would count in the softmax (a row of zeros has logit 0),
    so the loss would depend on the layout and differ from the model's; here they are -inf for the softmax.

    Args:
        num_tokens: the real vocabulary size; `vocab_size` is the padded one.
        frequencies: rotary inverse frequencies, exactly as Hugging Face's model has them.
        separate_documents: tokens are rotated by their `position_ids`, not by their place in the sample.
    """

    def __init__(
        self,
        *args: Any,
        num_tokens: int,
        frequencies: tuple[float, ...],
        separate_documents: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.separate_documents = separate_documents
        device = torch.cuda.current_device()
        self.rotary_pos_emb.inv_freq = torch.tensor(frequencies, dtype=torch.float32, device=device)
        group = self.pg_collection.tp
        rows = self.vocab_size // group.size()
        self.real_rows = min(max(num_tokens - group.rank() * rows, 0), rows)
        self.has_padding = self.real_rows < rows

    def _preprocess(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **others: Any) -> tuple[Any, ...]:
        found = super()._preprocess(input_ids=input_ids, position_ids=position_ids, **others)
        if not self.separate_documents:
            return found
        assert found[1] is not None, "only rotary positions are built here"
        # [s, b, 1, d] in the place of [s, 1, 1, d]
        length = position_ids.shape[1] * self.config.context_parallel_size
        angles = self.rotary_pos_emb(length, packed_seq=True)  # of whole samples, on every rank
        return found[0], angles[:, 0][position_ids.t()], *found[2:]

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """labels [b, s], logits [s, b, v/tp] -> loss of each token [b, s]."""
        if self.has_padding:
            logits = _Mask.apply(logits, self.real_rows)
        return super().compute_language_model_loss(labels, logits)


class _Mask(torch.autograd.Function):
    """Fills columns from `start` on with the lowest number, in place. Their gradient is zero already: their share of
    the softmax is, and no label points at them."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, start: int) -> torch.Tensor:
        ctx.mark_dirty(logits)
        logits[..., start:] = torch.finfo(logits.dtype).min
        return logits

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad, None


def build_chunks(
    config: TransformerConfig,
    ddp_config: DistributedDataParallelConfig,
    layout: ParallelLayout,
    family: Family,
    hf_config: dict[str, Any],
    *,
    separate_documents: bool = False,
) -> list[DistributedDataParallel]:
    """This pipeline stage's part of the model: one chunk, or `layout.vpp` of them, wrapped for precision and DDP."""
    wrapped = []
    for index, chunk in enumerate(_models(config, layout, family, hf_config, separate_documents)):
        _mark_experts(chunk, layout)
        module = Float16Module(config, chunk) if config.fp16 or config.bf16 else chunk
        # Buckets let the reduction start early; of an interleaved stage only the first chunk finishes late enough.
        wrapped.append(DistributedDataParallel(config, ddp_config, module, disable_bucketing=index > 0))
    return wrapped


def _mark_experts(chunk: Model, layout: ParallelLayout) -> None:
    """Tell DDP and the optimizer that the experts are replicated over other ranks than the dense weights.

    Megatron says so (`allreduce` False) only under expert parallelism. But experts that are split otherwise than the
    rest (ETP != TP) are too: taken for dense ones, different shards would be averaged over the data-parallel ranks, or
    equal ones would not be reduced, without an error.
    """
    if layout.expert_tp != layout.tp:
        for name, parameter in chunk.named_parameters():
            if ".mlp.experts." in name:
                parameter.allreduce = False  # type: ignore[attr-defined]


def _models(
    config: TransformerConfig,
    layout: ParallelLayout,
    family: Family,
    hf_config: dict[str, Any],
    separate_documents: bool = False,
) -> list[Model]:
    arguments = family.gpt_model(hf_config)
    num_tokens = arguments.pop("vocab_size")
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    num_chunks = layout.vpp or 1
    return [
        Model(
            config=config,
            transformer_layer_spec=block_spec(config, index if layout.vpp else None, separate_documents),
            vocab_size=family.shape(hf_config).padded_vocab_size(layout.tp),
            num_tokens=num_tokens,
            frequencies=family.rope(hf_config).inverse_frequencies,
            separate_documents=separate_documents,
            pre_process=first and index == 0,
            post_process=last and index == num_chunks - 1,
            parallel_output=True,
            vp_stage=index if layout.vpp else None,
            **arguments,
        )
        for index in range(num_chunks)
    ]


def unwrap(module: Any) -> Model:
    """The model inside DDP and the precision wrapper."""
    while not isinstance(module, Model):
        module = module.module
    return module


@torch.no_grad()
def free(chunks: list[DistributedDataParallel]) -> None:
    """Give back the memory of weights and gradients now, whoever still refers to the modules. They are unusable after.

    DDP's hooks hang on autograd nodes that refer back to it: cycles that the garbage collector cannot see through.
    """
    for chunk in chunks:
        chunk.grad_accs.clear()
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            for data in (buffer.grad_data, buffer.param_data):
                if data is not None:
                    data.untyped_storage().resize_(0)
        for parameter in chunk.parameters():
            parameter.grad = None
            parameter.data = parameter.data.new_empty(0)
