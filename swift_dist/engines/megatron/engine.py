"""The Megatron engine: one rank's part of a pretraining job on megatron-core, with CUDA + NCCL or CPU + gloo."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from swift_dist.config import JobConfig
from swift_dist.engines.base import DataCoordinates, Evaluation, MicroBatch, StepResult
from swift_dist.engines.megatron import cpu_shim
from swift_dist.engines.tracebacks import no_references_in_tracebacks
from swift_dist.models import Family
from swift_dist.optim import build_schedule
from swift_dist.parallel import ParallelLayout
from swift_dist.runs.guard import Continue, Decision, GuardError, GuardHistory, GuardPolicy, Skip, Stop, decide
from swift_dist.runs.worker import Worker


class MegatronEngine:
    """Builds the model on this rank, trains it step by step, hands its state to whoever saves it.

    All methods are collective. The engine joins the process groups when it is made and leaves them in `close`, after
    which the same process can make another one.

    Args:
        job: the job.
        layout: a valid layout of `worker.world_size` ranks.
        family: the model's family.
        hf_config: the model's config.json.
        worker: this rank.
    """

    exports = False

    def __init__(
        self, job: JobConfig, layout: ParallelLayout, family: Family, hf_config: dict[str, Any], worker: Worker
    ) -> None:
        cpu_shim.apply()
        from megatron.core.distributed import finalize_model_grads

        from swift_dist.engines.megatron import groups, model, rng, settings, weights
        from swift_dist.engines.megatron.optimizer import build_optimizer, loss_scaler

        settings.check(job, worker.device)
        logging.getLogger("megatron.core").setLevel(logging.WARNING)  # it logs the name of every parameter
        self.job, self.layout, self.family, self.hf_config = job, layout, family, hf_config
        self.device = torch.device(worker.device)
        self.rank = worker.rank
        place = layout.coordinates(worker.rank)
        # where documents end decides what every layer's attention sees
        needs_data = place.pp in (0, layout.pp - 1) or job.data.separate_documents
        self.data = DataCoordinates(place.dp, layout.dp, place.cp, layout.cp, needs_data)
        self.flops_per_token = family.shape(hf_config).flops_per_token(job.data.sequence_length)
        assert job.train.steps is not None, "resolve() fills it"
        self.schedule = build_schedule(job.schedule, peak=job.optimizer.lr, train_steps=job.train.steps)
        self.content_metadata = {"non_homogeneous_layers": True, "distrib_optim_sharding_type": "fully_reshardable"}
        self.content_metadata |= {"chained_optim_avoid_prefix": True}
        self.updates = 0
        self.steps = 0
        self.history = GuardHistory()
        self._params_stale = False
        self._closed = False
        try:
            groups.join(layout, worker, job.cluster.rendezvous_timeout)
            rng.seed_generators(job.train.seed, layout, worker.rank)
            self.config = settings.transformer_config(job, layout, family, hf_config, worker.device)
            ddp = settings.ddp_config(job)
            self.chunks = model.build_chunks(
                self.config, ddp, layout, family, hf_config, separate_documents=job.data.separate_documents
            )
            for chunk in self.chunks:
                weights.initialise(model.unwrap(chunk), self.config, self._metadata(), job.train.seed)
            self.optimizer = build_optimizer(job, self.chunks)
            self.optimizer.reload_model_params()
            self.config.finalize_model_grads_func = finalize_model_grads
            if ddp.overlap_grad_reduce:  # reductions start with the last micro-batch only
                no_sync = [chunk.no_sync for chunk in self.chunks]
                self.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
            self._scaler = loss_scaler(self.optimizer)
            if self._scaler is not None:
                self.config.grad_scale_func = self.optimizer.scale_loss
        except BaseException:
            self.close()
            raise

    def prepare(self, data: Any, show: Callable[[float], None]) -> bool:
        """Nothing: a step needs no more than its data and the weights."""
        return False

    def train_step(self, micro_batches: list[MicroBatch], step: int, *, stop: bool = False) -> StepResult:
        """One optimizer step.

        The loss, the gradient norm and whether to stop travel in one small reduction, before the weights change: so
        every rank decides alike, and a step that is skipped really is.

        Raises:
            GuardError: a NaN, an infinity or a loss spike where the job's policy is to stop.
            RuntimeError: a peer died. Call `close`, so that other ranks that wait for this one notice too.
        """
        with no_references_in_tracebacks():
            return self._train_step(micro_batches, step, stop)

    def _train_step(self, micro_batches: list[MicroBatch], step: int, stop: bool) -> StepResult:
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        run = self._pass(micro_batches)
        run.run()
        overflow = self.optimizer.prepare_grads()
        grad_norm = self.optimizer.get_grad_norm()
        loss, tokens, grad_norm, overflow, stop = self._agree(run.contribution(), grad_norm, overflow, stop)
        decision = self._decide(step, loss, grad_norm, overflow)
        lr = self.schedule(step)
        if isinstance(decision, Continue):
            self._update(lr, grad_norm)
        if not self._overflowed(loss, overflow):
            self.history = self.history.after(decision, loss)
        self.steps = step + 1
        self._params_stale = True
        reason = decision.reason if isinstance(decision, Skip) else ""
        return StepResult(loss, grad_norm, lr, tokens, bool(reason), reason, stop)

    def _pass(self, micro_batches: list[MicroBatch]) -> Any:
        from swift_dist.engines.megatron.step import Pass

        train = self.job.train
        count = train.global_batch_size // (train.micro_batch_size * self.layout.dp)
        assert len(micro_batches) == (count if self.data.needs_data else 0), "wrong number of micro-batches"
        shape = (train.micro_batch_size, self.job.data.sequence_length)
        separates = self.job.data.separate_documents
        return Pass(self.chunks, self.layout, micro_batches, count, shape, self.device, separate_documents=separates)

    def _agree(
        self, contribution: tuple[float, float], grad_norm: float, overflow: bool, stop: bool
    ) -> tuple[float, int, float, bool, bool]:
        """(loss, tokens, gradient norm, overflow, stop) of the step, the same on every rank."""
        norm = (grad_norm or 0.0) if self.rank == 0 else 0.0  # all ranks have it; take one's
        numbers = torch.tensor(
            [*contribution, norm, float(overflow), float(stop)], dtype=torch.float64, device=self.device
        )
        dist.all_reduce(numbers)
        loss_sum, tokens, norm, overflow_count, stop_count = numbers.tolist()
        return loss_sum / max(tokens, 1.0), round(tokens), norm, overflow_count > 0, stop_count > 0

    def _overflowed(self, loss: float, overflow: bool) -> bool:
        """An fp16 overflow that a smaller loss scale cures."""
        return overflow and math.isfinite(loss) and self._scaler is not None and not self._scaler.at_minimum

    def _decide(self, step: int, loss: float, grad_norm: float, overflow: bool) -> Decision:
        if self._overflowed(loss, overflow):
            assert self._scaler is not None
            scale = self._scaler.scale.item()
            self._scaler.move(True)
            return Skip(f"fp16 gradients overflow at loss scale {scale:g}")
        decision = decide(
            GuardPolicy.of(self.job.train),
            self.history,
            step=step + 1,
            global_batch_size=self.job.train.global_batch_size,
            loss=loss,
            grad_norm=math.inf if overflow else grad_norm,
        )
        if isinstance(decision, Stop):
            raise GuardError(decision.reason, decision.remedy)
        if self._scaler is not None:
            self._scaler.move(overflow)
        return decision

    def _update(self, lr: float, grad_norm: float) -> None:
        from swift_dist.engines.megatron.optimizer import clip, set_rates

        set_rates(self.optimizer, lr, self.job.optimizer.weight_decay)
        clip(self.optimizer, self.job.optimizer.clip_grad, grad_norm)
        self.optimizer.step_with_ready_grads()
        self.updates += 1

    def evaluate(self, batches: Iterable[list[MicroBatch]]) -> Evaluation:
        """Mean loss over the counting tokens of some global batches, with dropout off; nan if there are none."""
        with torch.no_grad(), no_references_in_tracebacks():
            return Evaluation(self._evaluate(batches))

    def _evaluate(self, batches: Iterable[list[MicroBatch]]) -> float:
        self._gather_params()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for chunk in self.chunks:
            chunk.eval()
        for micro_batches in batches:
            run = self._pass(micro_batches)
            run.run(forward_only=True)
            totals += torch.tensor(run.contribution(), dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        loss_sum, tokens = totals.tolist()
        return loss_sum / tokens if tokens else math.nan

    def _gather_params(self) -> None:
        """Parameters whose gathering overlaps with the next forward are old until then; get them now."""
        if self._params_stale and self.chunks[0].ddp_config.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)
        self._params_stale = False

    def _metadata(self) -> dict[str, Any]:
        from megatron.core import parallel_state

        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        return {**self.content_metadata, "dp_cp_group": group}

    def sharded_state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        """Everything that a resume needs, for `megatron.core.dist_checkpointing`.

        Keys: ``model`` (or ``model0``, ``model1`` ... for interleaved chunks), ``optimizer``, ``rng`` (see rng.py) and
        ``engine`` (plain numbers).
        """
        from swift_dist.engines.megatron import state

        self._gather_params()
        return state.collect(self, is_loading)

    def load_state_dict(self, loaded: dict[str, Any]) -> None:
        """Take over what was loaded into `sharded_state_dict(is_loading=True)`."""
        from swift_dist.engines.megatron import state

        state.restore(self, loaded)

    def load_pretrained(self, folder: Path) -> None:
        """Take the weights from a Hugging Face folder; each rank reads its own slices of the safetensors only."""
        from swift_dist.engines.megatron import state

        state.load_pretrained(self, folder)

    def export(self, run_dir: Path) -> Path | None:
        """Nothing: a model that was trained on many ranks is gathered by `swift-dist convert`, not on one of them."""
        return None

    def close(self) -> None:
        """Leave the process groups and free the model. Never waits for a peer; may be called twice."""
        if self._closed:
            return
        self._closed = True
        from swift_dist.engines.megatron import groups, model
        from swift_dist.engines.megatron.optimizer import free_state

        if "chunks" in self.__dict__:
            model.free(self.chunks)
        if "optimizer" in self.__dict__:
            free_state(self.optimizer)
        for name in ("optimizer", "chunks", "config", "_scaler"):
            self.__dict__.pop(name, None)
        groups.leave()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
