"""The reference model's log-probabilities: of the model before it learnt, or of another one."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from swift_dist.config import JobConfig
from swift_dist.engines.hf.batches import Forward, Prepared

if TYPE_CHECKING:
    from swift_dist.engines.hf.engine import HFEngine


class Reference:
    """Made before the strategy shards the model that learns.

    An adapter's base is the reference where no other is named: the same weights serve both, with the adapter switched
    off. Otherwise a second, frozen model in the compute precision is held; where the strategy shards weights, its
    weights are sharded too (with FSDP2, which needs no optimizer for it).

    Args:
        job: the job.
        hf_config: the model's config.json.
        engine: whose model learns.
    """

    def __init__(self, job: JobConfig, hf_config: dict[str, Any], engine: HFEngine) -> None:
        from swift_dist.engines.hf import model

        self._engine = engine
        self._module: torch.nn.Module | None = None
        if job.objective.reference is None and engine.tuners.without(engine.model) is not None:
            return
        torch.manual_seed(job.train.seed)  # of a model without a folder, the same random weights again
        path = job.objective.reference or _own(job)
        reference: Any = model.load_base(job, hf_config, engine.objective.needs, None, path=path)
        if engine.batch_layout == "packed":
            model.choose_layout(job, reference, engine.objective.needs)
        self._forward = Forward(reference, engine.objective.needs)
        reference.requires_grad_(False).eval()
        self._module = _placed(reference, job, engine.device)

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


def _own(job: JobConfig) -> str | None:
    """The folder of the job's own model; None: random weights, which the seed makes again."""
    return job.model.path if job.model.resolved_init == "pretrained" else None


def _placed(reference: torch.nn.Module, job: JobConfig, device: torch.device) -> torch.nn.Module:
    from swift_dist.engines.hf.strategies.fsdp2 import shard_frozen

    sharded = job.strategy.name == "fsdp2" or (job.strategy.deepspeed or "").startswith("zero3")
    return shard_frozen(reference, job, device) if sharded else reference.to(device)
