"""What rank 0 writes down of a run while it trains: metrics.jsonl, TensorBoard, trackers. Other ranks write nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from swift_dist.config import JobConfig
from swift_dist.runs.metrics import MetricsLog
from swift_dist.runs.reporters import Reporters
from swift_dist.runs.throughput import Throughput, memory_gib
from swift_dist.runs.worker import Worker

_SECONDS_BETWEEN_SHARES = 5.0


class StepNumbers(Protocol):
    """What an engine says about a step, the same on every rank."""

    @property
    def loss(self) -> float: ...
    @property
    def grad_norm(self) -> float: ...
    @property
    def lr(self) -> float: ...
    @property
    def tokens(self) -> int: ...
    @property
    def skipped(self) -> bool: ...
    @property
    def reason(self) -> str: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...


class Recorder:
    """Takes a step's numbers from the training loop, at the cost of one short file write (trackers have own threads).

    Args:
        job: the job.
        worker: this rank; only rank 0 records.
        flops_per_token: forward and backward, from `ModelShape.flops_per_token`.
        first_step: steps that were done before (0: from scratch). Later rows of an earlier attempt are dropped.
    """

    def __init__(self, job: JobConfig, worker: Worker, flops_per_token: float, first_step: int = 0) -> None:
        self._writes = worker.rank == 0
        if not self._writes:
            return
        self._device, self._told = worker.device, time.monotonic()
        self._throughput = Throughput.of(
            worker.device,
            flops_per_token=flops_per_token,
            num_devices=worker.world_size,
            precision=job.train.precision if job.train.fp8 == "none" else "fp8",
        )
        self._log = MetricsLog(worker.run_dir / "metrics.jsonl", first_step)
        answers = job.train.eval_interval and job.train.eval_answers
        self._answers = MetricsLog(worker.run_dir / "answers.jsonl", first_step) if answers else None
        self._reporters = Reporters(job, worker.run_dir, first_step)

    def step(self, step: int, result: StepNumbers, *, seconds: float, data_wait: float) -> None:
        """A step is done.

        Args:
            step: steps done so far, this one included.
            result: its numbers; ``tokens`` of the whole global batch.
            seconds: wall time of the step, waiting for data included.
            data_wait: the part of it that waited for data.

        Raises:
            RunError: if metrics.jsonl cannot be written.
        """
        if not self._writes:
            return
        row: dict[str, object] = {
            "step": step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "tokens": result.tokens,
            "step_seconds": round(seconds, 6),
            **self._throughput.rates(result.tokens, seconds),
            "memory_gib": memory_gib(self._device),
            "data_wait_seconds": round(data_wait, 6),
        }
        row |= result.metrics
        if result.skipped:
            row.update(skipped=True, reason=result.reason)
        self._reporters.log(self._log.append(row))

    def preparation(self, step: int, share: float) -> None:
        """How much of what precedes the next step is done: a row every few seconds, for whoever watches the run."""
        if self._writes and time.monotonic() - self._told >= _SECONDS_BETWEEN_SHARES:
            self._told = time.monotonic()
            self._log.append({"step": step, "prepared": round(share, 4)})

    def evaluation(
        self,
        step: int,
        loss: float,
        metrics: Mapping[str, float] | None = None,
        answers: Sequence[Mapping[str, object]] = (),
    ) -> None:
        """The validation loss after `step` steps, the objective's other means, and answers of the model."""
        if self._writes:
            for answer in answers:
                assert self._answers is not None, "train.eval_answers is set"
                self._answers.append({"step": step, **answer})
            others = {f"eval_{name}": value for name, value in (metrics or {}).items()}
            self._reporters.log(self._log.append({"step": step, "eval_loss": loss, **others}))

    def close(self) -> None:
        """Flush everything; trackers get a bounded time."""
        if self._writes:
            self._reporters.close()
            self._log.close()
            if self._answers is not None:
                self._answers.close()
