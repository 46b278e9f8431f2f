"""The hf engine: one rank's part of fine-tuning a transformers model, with CUDA + NCCL or CPU + gloo."""

from __future__ import annotations

import contextlib
import gc
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from swift_dist.config import JobConfig
from swift_dist.engines.base import DataCoordinates, Evaluation, MicroBatch, StepResult
from swift_dist.engines.groups import BUILD_TIMEOUT, join_world, leave_world, wait_longer
from swift_dist.engines.hf import checkpoint, model, model_kernels, offload, tiled_mlp
from swift_dist.engines.hf.batches import Forward, Prepared, parted, prepare
from swift_dist.engines.hf.generation import Answering
from swift_dist.engines.hf.precomputed import Precomputed
from swift_dist.engines.hf.reference import Reference
from swift_dist.engines.hf.strategies import _first_rank as first_rank
from swift_dist.engines.hf.strategies.base import Setting, Strategy
from swift_dist.engines.hf.tokenizer import choose_pad
from swift_dist.engines.tracebacks import no_references_in_tracebacks
from swift_dist.objectives.base import Batch, Objective
from swift_dist.optim import build_schedule, make_optimizer, parameter_groups
from swift_dist.parallel import ParallelLayout
from swift_dist.plugins import find
from swift_dist.runs.guard import Continue, Decision, GuardError, GuardHistory, GuardPolicy, Skip, Stop, decide
from swift_dist.runs.worker import Worker
from swift_dist.sequence_parallel.degrees import degrees_of
from swift_dist.sequence_parallel.group import SharingRanks, make_groups
from swift_dist.tuners import find_tuners


class HFEngine:
    """Builds the model on this rank, trains it step by step, hands its state to whoever saves it.

    All methods are collective. The engine joins the group of all ranks when it is made and leaves it in `close`, after
    which the same process can make another one.

    Args:
        job: the job.
        hf_config: the model's config.json.
        worker: this rank.
    """

    exports = True

    def __init__(self, job: JobConfig, hf_config: dict[str, Any], worker: Worker) -> None:
        self.job, self.worker = job, worker
        self.device = torch.device(worker.device)
        size = job.parallel.context_parallel_size
        self.layout = ParallelLayout(world_size=worker.world_size, cp=size)
        # every rank of a group reads the whole row and takes its own tokens (`batches.prepare`)
        self.data = DataCoordinates(worker.rank // size, worker.world_size // size, worker.rank % size, size, True)
        self.sharing: SharingRanks | None = None
        self.content_metadata: dict[str, Any] = {}
        self.objective: Objective = find("swift_dist.objectives", job.objective.resolved_name(job.task), "OBJECTIVE")
        self.objective_options = getattr(job.objective, self.objective.name, None)
        self.tuners = find_tuners(job.tuner)
        assert job.train.steps is not None, "resolve() fills it"
        self.schedule = build_schedule(job.schedule, peak=job.optimizer.lr, train_steps=job.train.steps)
        self.updates = self.steps = 0
        self.history = GuardHistory()
        self._answering: Answering | None = None
        self._closed = False
        try:
            join_world(worker, job.cluster.rendezvous_timeout)
            if size > 1:
                reference = model.text_config(job, {}, job.objective.reference) if job.objective.reference else None
                whole = model.text_config(job, hf_config)
                degrees = degrees_of(job, whole, worker.local_world_size, reference)
                self.sharing = make_groups(degrees, worker.rank, worker.world_size)
            wait_longer(BUILD_TIMEOUT)
            self._build(hf_config)
            wait_longer()
        except BaseException:
            self.close()
            raise

    def _build(self, hf_config: dict[str, Any]) -> None:
        job = self.job
        from_first_rank = first_rank.reads_alone(job, is_quantized=model.is_quantized(hf_config, self.tuners))
        with first_rank.failing_together(from_first_rank):
            self._make_model(hf_config, on_meta=from_first_rank and self.worker.rank > 0)
        if from_first_rank:
            first_rank.require_alike(self.model)
            kept = [value for state in self.tuners.state(self.model).values() for value in state.values()]
            first_rank.hand_out(filter(torch.is_tensor, kept), self.device, torch.device("cpu"))
        self.flops_per_token = _flops_per_token(self.model)
        self.reference: Reference | Precomputed | None = None
        if self.objective.needs_reference(self.objective_options):
            kind = Precomputed if job.objective.precompute_reference else Reference
            self.reference = kind(job, hf_config, self)
        setting = Setting(
            job=job,
            device=self.device,
            group=None,
            make_optimizer=self._make_optimizer,
            parameter_groups=lambda module: parameter_groups(module, job.optimizer, self.tuners.learning_rate_scale),
            from_first_rank=from_first_rank,
        )
        make = find("swift_dist.engines.hf.strategies", job.strategy.name, "STRATEGY")
        self.strategy: Strategy = make(self.model, setting)

    def _make_model(self, hf_config: dict[str, Any], *, on_meta: bool) -> None:
        job, needs = self.job, self.objective.needs
        torch.manual_seed(job.train.seed)  # heads and adapters begin alike on every rank
        num_labels = 1 if needs == "sequence_scores" and self.objective.sample == "pair" else job.model.num_labels
        base: Any = model.load_base(job, hf_config, needs, self.tuners, num_labels=num_labels, on_meta=on_meta)
        self.batch_layout = model.choose_layout(job, base, needs)
        self.pad_id = choose_pad(base, job, needs)
        if job.train.recompute == "full":
            model.recompute_layers(base)
        model_kernels.use(base, job, self.device)
        tiled_mlp.tile(base, job)
        self.model = model.apply_tuners(base, self.tuners, job.train.seed, on_meta=on_meta)
        self.forward = Forward(base, needs, tiled=model.tiles_loss(job))  # sees what a tuner made of the output layer
        if job.train.offload_activations:
            offload.install(self.model, self.device)
        if job.train.compile:
            model.compile_layers(self.model)

    def _make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
            return make_optimizer(groups, self.job.optimizer, self.device)

        return self.tuners.optimizer(groups, make)

    def prepare(self, data: Any, show: Callable[[float], None]) -> bool:
        """What is left to be done before the first step, once the data are open and a checkpoint is loaded: with
        `objective.precompute_reference` the reference's pass over the samples.

        Args:
            data: a `SampleData`.
            show: told now and then, on every rank, which share is done.

        Returns:
            Whether some rank was asked to stop meanwhile; the same command goes on with the pass.
        """
        if not isinstance(self.reference, Precomputed):
            return False
        with no_references_in_tracebacks():
            return self.reference.prepare(data, show)

    def train_step(self, micro_batches: list[MicroBatch], step: int, *, stop: bool = False) -> StepResult:
        """One optimizer step. What every rank must know alike travels in one small reduction before weights change.

        Raises:
            GuardError: a NaN, an infinity or a loss spike where the job's policy is to stop.
            RuntimeError: a peer died. Call `close`, so that other ranks that wait for this one notice too.
        """
        with no_references_in_tracebacks():
            return self._train_step(micro_batches, step, stop)

    def _train_step(self, micro_batches: list[MicroBatch], step: int, stop: bool) -> StepResult:
        self.strategy.module.train()
        # dropout: a pure function of the step, so a resume needs no generator's state
        torch.manual_seed(_mixed(self.job.train.seed, step, self.worker.rank))
        self.tuners.before_step(self.model, step, self.job.train.steps or 0)
        prepared, mismatched = self.prepared(micro_batches)
        total = self._total(prepared)
        statistics = self._statistics(mismatched or prepared)
        sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64, device=self.device))
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, item in enumerate(prepared):
            batch = replace(self._with_reference(item), statistics=statistics)
            with self.strategy.accumulate(index == len(prepared) - 1):
                part = self.objective.loss(self._forward(item, batch), total, self.objective_options)
                self.strategy.backward(part.value)
            loss += part.value.detach()
            _add(sums, part.metrics)
        grad_norm = self.strategy.gradient_norm()
        tokens = sum(item.num_tokens for item in prepared)
        return self._finish(step, loss, grad_norm, tokens, stop, sums)

    def _finish(
        self, step: int, loss: Any, grad_norm: float, tokens: int, stop: bool, sums: dict[str, torch.Tensor]
    ) -> StepResult:
        norm = grad_norm if self.worker.rank == 0 else 0.0  # all ranks have it; take one's
        head = torch.tensor([float(loss), norm, tokens, float(stop)], dtype=torch.float64, device=self.device)
        numbers = torch.cat([head, *(sums[name] for name in sorted(sums))])
        if self.sharing is not None and self.sharing.rank > 0:
            numbers[:3], numbers[4:] = 0, 0  # as in `sum_over_replicas`; any rank may be asked to stop
        dist.all_reduce(numbers)
        value, norm, all_tokens, stops, *rest = numbers.tolist()
        decision = self._decide(step, value, norm)
        lr = self.schedule(step)
        if isinstance(decision, Continue):
            self.strategy.update(lr, self._ready(step, norm))
            self.updates += 1
        else:
            self.strategy.skip()
        if not self._overflowed(value, norm):
            self.history = self.history.after(decision, value)
        self.steps = step + 1
        reason = decision.reason if isinstance(decision, Skip) else ""
        return StepResult(
            value, norm, lr, round(all_tokens), bool(reason), reason, stops > 0, _means(sorted(sums), rest)
        )

    def _ready(self, step: int, norm: float) -> float:
        """Let tuners see the step's gradients; returns the norm of what they made of them."""
        if not self.tuners.changes_gradients:
            return norm
        scale = self.strategy.loss_scale or 1.0
        self.tuners.before_update(self.model, step, self.job.train.steps or 0, gradient_scale=scale)
        return self.strategy.gradient_norm()

    def _overflowed(self, loss: float, grad_norm: float) -> bool:
        """An fp16 overflow that a smaller loss scale cures."""
        scale = self.strategy.loss_scale
        return scale is not None and scale > 1 and math.isfinite(loss) and not math.isfinite(grad_norm)

    def _decide(self, step: int, loss: float, grad_norm: float) -> Decision:
        if self._overflowed(loss, grad_norm):
            return Skip(f"fp16 gradients overflow at loss scale {self.strategy.loss_scale:g}")
        decision = decide(
            GuardPolicy.of(self.job.train),
            self.history,
            step=step + 1,
            global_batch_size=self.job.train.global_batch_size,
            loss=loss,
            grad_norm=grad_norm,
        )
        if isinstance(decision, Stop):
            raise GuardError(decision.reason, decision.remedy)
        return decision

    def _forward(self, item: Prepared, batch: Batch) -> Batch:
        outputs = self.forward(self.strategy.module, item)
        return replace(batch, logps=outputs.logps, scores=outputs.scores)

    def _with_reference(self, item: Prepared) -> Batch:
        return item.batch if self.reference is None else self.reference.beside(item)

    def prepared(self, micro_batches: Iterable[MicroBatch]) -> tuple[list[Prepared], list[Prepared]]:
        """What the loss is computed of, and KTO's mismatched answers (none of other objectives)."""
        parts = [parted(batch) for batch in micro_batches]
        needs, sharing = self.objective.needs, self.sharing
        packs = self.batch_layout == "packed"
        mine = [prepare(batch, self.device, needs, sharing, packs_text=packs) for batch, _ in parts]
        return mine, [prepare(other, self.device, needs, sharing) for _, other in parts if other is not None]

    def sum_over_replicas(self, numbers: torch.Tensor) -> torch.Tensor:
        """Add up, in place, what each data-parallel replica counted: of ranks that share a row, which all count the
        same, the first one's."""
        if self.sharing is not None and self.sharing.rank > 0:
            numbers.zero_()
        dist.all_reduce(numbers)
        return numbers

    def _total(self, prepared: list[Prepared]) -> torch.Tensor:
        """What the loss is normalised by, over the global batch."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for item in prepared:
            total += self.objective.count(item.batch)
        return self.sum_over_replicas(total).clamp(min=1e-12).float()

    def _statistics(self, prepared: list[Prepared]) -> dict[str, float]:
        """What an objective wants to know of the whole global batch before any loss: a forward pass of its own."""
        if self.objective.statistics is None:
            return {}
        sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=self.device))
        with torch.no_grad(), self.inference():
            for item in prepared:
                batch = self._forward(item, self._with_reference(item))
                for name, value in self.objective.statistics(batch, self.objective_options).items():
                    sums[name] += value
        numbers = self.sum_over_replicas(torch.stack([sums[name] for name in sorted(sums)]))
        return dict(zip(sorted(sums), numbers.tolist(), strict=True))

    def inference(self) -> AbstractContextManager[None]:
        """Around forward passes without gradient: dropout and noise are off."""
        return _eval_mode(self.strategy.module)

    def evaluate(self, batches: Iterable[list[MicroBatch]]) -> Evaluation:
        """Mean loss over some global batches, with dropout off; nan if there are none."""
        with torch.no_grad(), self.inference(), no_references_in_tracebacks():
            batches = list(batches)
            evaluation = self._evaluate(batches)
            if self.job.train.eval_answers:
                self._answering = self._answering or Answering(self)
                evaluation = replace(evaluation, answers=self._answering(batches))
            return evaluation

    def _evaluate(self, batches: Iterable[list[MicroBatch]]) -> Evaluation:
        sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64, device=self.device))
        for micro_batches in batches:
            prepared, mismatched = self.prepared(micro_batches)
            total, statistics = self._total(prepared), self._statistics(mismatched or prepared)
            for item in prepared:
                batch = replace(self._with_reference(item), statistics=statistics)
                part = self.objective.loss(self._forward(item, batch), total, self.objective_options)
                count = self.objective.count(item.batch).double()
                _add(sums, {**part.metrics, "": (part.value * total, count)})
        if not sums:
            return Evaluation(math.nan)
        names = sorted(sums)
        numbers = self.sum_over_replicas(torch.cat([sums[name] for name in names]))
        means = _means(names, numbers.tolist())
        return Evaluation(means.pop("", math.nan), means)

    def sharded_state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        """Everything that a resume needs: pieces of tensors for `megatron.core.dist_checkpointing`, plain numbers."""
        return checkpoint.collect(self, is_loading)

    def load_state_dict(self, loaded: dict[str, Any]) -> None:
        """Take over what was loaded into `sharded_state_dict(is_loading=True)`."""
        checkpoint.restore(self, loaded)

    def load_pretrained(self, folder: Path) -> None:
        """Nothing: the model was made with its weights."""

    def export(self, run_dir: Path) -> Path | None:
        """Write what `from_pretrained` reads, into `run_dir`; returns the folder, on rank 0."""
        return checkpoint.export(self, run_dir)

    def close(self) -> None:
        """Leave the process groups and free the model. Never waits for a peer; may be called twice."""
        if self._closed:
            return
        self._closed = True
        strategy = self.__dict__.pop("strategy", None)
        if strategy is not None:
            strategy.close()
        for name in ("model", "forward", "reference", "_answering"):
            self.__dict__.pop(name, None)
        leave_world()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@contextlib.contextmanager
def _eval_mode(module: torch.nn.Module) -> Any:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _mixed(*numbers: int) -> int:
    """One seed of several numbers."""
    value = 0
    for number in numbers:
        value = (value * 1_000_003 + number + 1) % (1 << 63)
    return value


def _add(sums: dict[str, torch.Tensor], metrics: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    for name, (value, count) in metrics.items():
        sums[name] += torch.stack((torch.as_tensor(value).double(), torch.as_tensor(count).double())).to(sums[name])


def _means(names: list[str], numbers: list[float]) -> dict[str, float]:
    return {
        name: numbers[2 * index] / numbers[2 * index + 1] for index, name in enumerate(names) if numbers[2 * index + 1]
    }


def _flops_per_token(model: torch.nn.Module) -> float:
    """Of forward and backward: 2 for each weight forward, 2 for the gradient of activations, 2 for that of a weight
    that learns. (Attention's own products, which depend on the length, are left out.)"""
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    learning = sum(p.numel() for p in model.parameters() if p.dim() > 1 and p.requires_grad)
    return 4.0 * weights + 2.0 * learning
