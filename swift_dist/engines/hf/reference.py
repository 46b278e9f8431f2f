"""The reference model's log-probabilities: of the model before it learnt, or of another one."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from swift_dist.config import JobConfig
from swift_dist.engines.hf.batches import Forward, Prepared
from swift_dist.objectives.base import Batch

if TYPE_CHECKING:
    from swift_dist.engines.hf.engine import HFEngine


class Reference:
    """Computes them beside the model that learns.

    An adapter's base is the reference where no other is named: the same weights serve both, with the adapter switched
    off. Otherwise a second, frozen model in the compute precision is held; where the strategy shards weights, its
    weights are sharded too (with FSDP2, which needs no optimizer for it).

    Args:
        job: the job.
        hf_config: the model's config.json.
        engine: whose model learns.
    """

    def __init__(self, job: JobConfig, hf_config: dict[str, Any], engine: HFEngine) -> None:
        from swift_dist.engines.hf import model, model_kernels, tiled_mlp
        from swift_dist.engines.hf.strategies import _first_rank as first_rank
        from swift_dist.engines.hf.strategies.fsdp2 import shard_frozen

        self._engine = engine
        self._module: torch.nn.Module | None = None
        if job.objective.reference is None and engine.tuners.without(engine.model) is not None:
            return
        torch.manual_seed(job.train.seed)  # of a model without a folder, the same random weights again
        needs = engine.objective.needs
        from_first_rank = first_rank.reads_alone(job, is_quantized=model.is_quantized(hf_config, None))
        with first_rank.failing_together(from_first_rank):
            on_meta = from_first_rank and engine.worker.rank > 0
            reference: Any = model.load_base(job, hf_config, needs, None, path=source(job), on_meta=on_meta)
            if engine.batch_layout == "packed":
                model.choose_layout(job, reference, needs)
        self._forward = Forward(reference, needs, tiled=model.tiles_loss(job))
        model_kernels.use(reference, job, engine.device)
        tiled_mlp.tile(reference, job)
        reference.requires_grad_(False).eval()
        if first_rank.shards_weights(job):
            self._module = shard_frozen(reference, job, engine.device, from_first_rank=from_first_rank)
        else:
            self._module = reference.to(engine.device)

    def beside(self, prepared: Prepared) -> Batch:
        """The micro-batch's `batch` with `reference_logps`."""
        return replace(prepared.batch, reference_logps=self.logps(prepared))

    def logps(self, prepared: Prepared) -> torch.Tensor:
        """Float32 [N], without gradient."""
        engine = self._engine
        with torch.no_grad(), contextlib.ExitStack() as stack:
            if self._module is not None:
                batch = self._forward(self._module, prepared)
            else:
                without = engine.tuners.without(engine.model)
                assert without is not None
                stack.enter_context(engine.inference())
                stack.enter_context(without)
                batch = engine.forward(engine.strategy.module, prepared)
        assert batch.logps is not None
        return batch.logps.detach()


def source(job: JobConfig) -> str | None:
    """The reference's folder or id; None: the job's own model has random weights, which the seed makes again."""
    own = job.model.path if job.model.resolved_init == "pretrained" else None
    return job.objective.reference or own
