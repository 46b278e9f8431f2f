"""Forward and backward over the micro-batches of a step, and the loss's normalisation.

The loss of a step is  sum over all counting tokens of the global batch / N,  N their number: whatever micro-batches,
data-parallel or context-parallel ranks they fall on. Megatron multiplies what a loss function returns by
cp / num_micro_batches, and its DDP averages gradients over dp * cp, so each rank hands over

    (sum of its token losses) * dp * num_micro_batches / N.

That keeps the scale of a mean (megatron's `calculate_per_token_loss` sums first and divides last, which overflows fp16)
and leaves the MoE auxiliary losses as they should be: their mean over the micro-batches of the step. With
`calculate_per_token_loss` megatron scales them by the tokens of one rank, too little by a factor tp * cp under sequence
or context parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from swift_dist.engines.base import MicroBatch
from swift_dist.engines.megatron.attention import documents_of
from swift_dist.kernels.zigzag import parts_of
from swift_dist.parallel import ParallelLayout


def cut(batch: MicroBatch, cp_rank: int, cp_size: int, device: torch.device) -> MicroBatch:
    """This context-parallel rank's part of a micro-batch, on its device: two chunks of each sample
    (`kernels/zigzag.py`), as attention expects. [b, S] -> [b, S/C] for each entry."""
    if cp_size > 1:
        batch = {name: _zigzag(tensor, cp_rank, cp_size) for name, tensor in batch.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _zigzag(tensor: torch.Tensor, cp_rank: int, cp_size: int) -> torch.Tensor:
    parts = parts_of(tensor.shape[1], cp_size, cp_rank)
    return torch.cat([tensor[:, begin:end] for _, begin, end in parts], dim=1)


def count_tokens(micro_batches: list[MicroBatch], device: torch.device) -> torch.Tensor:
    """N of the global batch, a float64 scalar. Collective over the data-parallel ranks of a pipeline stage."""
    count = sum(float(batch["loss_mask"].sum()) for batch in micro_batches)
    total = torch.tensor(count, dtype=torch.float64, device=device)
    group = parallel_state.get_data_parallel_group()
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return total


class Pass:
    """One pass of forward (and backward) over a global batch.

    Args:
        chunks: the model chunks of this rank, wrapped for DDP.
        layout: the layout; its dp scales the loss.
        micro_batches: this rank's micro-batches, whole sequences; [] where it needs no data.
        num_micro_batches: how many every rank runs.
        shape: (micro batch size, sequence length), the same everywhere.
        device: of this rank.
        separate_documents: tokens see those of their own document, which begins where a position is 0.
    """

    def __init__(
        self,
        chunks: list[Any],
        layout: ParallelLayout,
        micro_batches: list[MicroBatch],
        num_micro_batches: int,
        shape: tuple[int, int],
        device: torch.device,
        *,
        separate_documents: bool = False,
    ) -> None:
        self.chunks, self.layout, self.shape = chunks, layout, shape
        self.num_micro_batches, self.device = num_micro_batches, device
        cp_rank = parallel_state.get_context_parallel_rank()
        self.batches = [cut(batch, cp_rank, layout.cp, device) for batch in micro_batches]
        if separate_documents:  # of whole samples, and where attention plans its work: on the CPU
            for batch, whole in zip(self.batches, micro_batches, strict=True):
                batch["documents"] = documents_of(whole["position_ids"])
        self.num_tokens = count_tokens(micro_batches, device)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)

    def run(self, *, forward_only: bool = False) -> None:
        """Run the schedule. Afterwards `loss_sum` holds this rank's sum of token losses (last stage only)."""
        iterators = [iter(self.batches) for _ in self.chunks]
        get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=self.num_micro_batches,
            seq_length=self.shape[1],
            micro_batch_size=self.shape[0],
            forward_only=forward_only,
        )

    def _forward(self, batches: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Any]:
        batch = next(batches, None) or {}
        losses = model(
            batch.get("tokens"), batch.get("position_ids"), batch.get("documents"), labels=batch.get("labels")
        )
        return losses, partial(self._loss, batch["loss_mask"] if batch else None)

    def _loss(self, mask: torch.Tensor | None, losses: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Token losses [b, s] of a micro-batch -> what megatron differentiates."""
        assert mask is not None, "the last stage has data"
        total = torch.sum(losses.float() * mask)
        self.loss_sum += total.detach()
        # A batch in which no token counts has loss 0, not 0/0.
        scale = self.layout.dp * self.num_micro_batches / self.num_tokens.clamp(min=1)
        return total * scale.to(total.dtype), None

    def contribution(self) -> tuple[float, float]:
        """What this rank adds to (loss sum, token count) so that a sum over the world is the global batch's."""
        if not parallel_state.is_pipeline_last_stage() or parallel_state.get_tensor_model_parallel_rank() != 0:
            return 0.0, 0.0  # tensor-parallel ranks hold the same losses
        first = parallel_state.get_data_parallel_rank() == 0 and parallel_state.get_context_parallel_rank() == 0
        return self.loss_sum.item(), self.num_tokens.item() if first else 0.0
