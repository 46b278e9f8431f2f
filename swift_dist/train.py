"""THE page of a rank: layout -> data -> engine -> loop. Runs the same under the Ray gang and under torchrun."""

from __future__ import annotations

import importlib
import logging
import time
from dataclasses import asdict
from typing import Any

from swift_dist.checkpoint import CheckpointWriter, agree_on_checkpoint, agree_on_step, load
from swift_dist.config import JobConfig
from swift_dist.data import open_data
from swift_dist.engines import Engine, build_engine
from swift_dist.errors import RunError
from swift_dist.models import model_folder
from swift_dist.runs.evaluations import Evaluations
from swift_dist.runs.guard import GuardError
from swift_dist.runs.recorder import Recorder
from swift_dist.runs.worker import Worker

log = logging.getLogger(__name__)

_WARM = {
    "megatron": ("groups", "model", "optimizer", "rng", "settings", "state", "step", "weights"),
    "hf": ("engine",),
}


def warm(payload: dict[str, Any]) -> None:
    """Import what `main` will need: ranks do so side by side before they meet, spares while they wait."""
    engine = payload["job"]["engine"]
    importlib.import_module("swift_dist.engines.megatron.cpu_shim").apply()
    for name in _WARM[engine]:
        importlib.import_module(f"swift_dist.engines.{engine}.{name}")


def main(payload: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Train to `train.steps`, or to a requested stop; resume from the run folder's newest whole checkpoint.

    Args:
        payload: ``ResolvedJob.payload()``.
        worker: this rank.

    Returns:
        ``{"step", "loss", "stopped", "checkpoint", "export", "export_step", "message"}``, the same on every rank but
        for ``export`` (a folder on rank 0, where weights were written; else None). ``export_step``: the step that they
        are of (None: there are none). ``message``: what else is to be said of the end, "" as a rule.
    """
    job = JobConfig.model_validate(payload["job"])
    worker.beat("build", 0)
    engine = build_engine(job, payload["hf_config"], worker)
    try:
        return _train(job, engine, worker, payload)
    finally:
        engine.close()


def _train(job: JobConfig, engine: Engine, worker: Worker, payload: dict[str, Any]) -> dict[str, Any]:
    steps, patience = job.train.steps, job.train.early_stopping_patience
    assert steps is not None, "resolve() fills it"
    data = open_data(job, engine, payload, waiting=lambda step: worker.beat("load", step))
    writer = CheckpointWriter(
        worker.run_dir / "checkpoints",
        keep=job.checkpoint.keep,
        keep_every=job.checkpoint.keep_every,
        attempt=worker.attempt,
        async_save=job.checkpoint.async_save,
    )
    worker.beat("load", 0)
    step, evaluations = _start(job, engine, worker)
    recorder = Recorder(job, worker, engine.flops_per_token, first_step=step)
    loss, saved, exported, export_step = None, step, None, None
    try:
        stop = engine.prepare(data, lambda share: recorder.preparation(step, share))
        while step < steps and not stop and not evaluations.exhausted(patience):
            started = time.perf_counter()
            batches = data.micro_batches(step)
            worker.beat("step", step)
            result = engine.train_step(batches, step, stop=worker.stop_requested())
            step, loss, stop = step + 1, result.loss, result.stop
            recorder.step(step, result, seconds=time.perf_counter() - started, data_wait=data.wait_seconds)
            writer.poll()
            if job.train.eval_interval and (step % job.train.eval_interval == 0 or step == steps):
                worker.beat("eval", step)
                evaluation = engine.evaluate(data.validation_batches(job.train.eval_steps))
                recorder.evaluation(step, evaluation.loss, evaluation.metrics, evaluation.answers)
                evaluations = evaluations.after(step, evaluation.loss)
            due = job.checkpoint.interval and step % job.checkpoint.interval == 0
            best = job.checkpoint.keep_best and evaluations.best_step == step
            if due or best or stop or step == steps or evaluations.exhausted(patience):
                worker.beat("save", step)
                writer.save(step, engine.sharded_state_dict(), _metadata(job, engine, step, payload, evaluations))
                saved = step
        worker.beat("final", step)
        writer.wait()
        if engine.exports and (not stop or step == steps):
            export_step = _take_best(job, engine, worker, step, evaluations)
            exported = engine.export(worker.run_dir)
    except GuardError:
        worker.beat("final", step)
        try:
            writer.wait()  # every rank is here, and none is ill: let the checkpoint in flight become whole
        except RunError:
            log.exception("the checkpoint in flight is lost")
        raise
    finally:
        recorder.close()
        data.close()
        writer.close()
    stopped = stop and step < steps
    checkpoint = saved or None
    return {
        "step": step,
        "loss": loss,
        "stopped": stopped,
        "checkpoint": checkpoint,
        "export": exported and str(exported),
        "export_step": export_step,
        "message": "" if stopped else _message(job, step, evaluations, export_step),
    }


def _start(job: JobConfig, engine: Engine, worker: Worker) -> tuple[int, Evaluations]:
    """Weights and state to begin with; returns the number of steps already done, and how evaluations went."""
    directory = worker.run_dir / "checkpoints"
    checkpoint = agree_on_checkpoint(directory, job.checkpoint.load, rank=worker.rank, store=worker.store())
    if checkpoint is not None:
        engine.load_state_dict(load(checkpoint, engine.sharded_state_dict(is_loading=True)))
        log.info("goes on from %s", checkpoint.path)
        is_own = checkpoint.path.resolve().parent == directory.resolve()
        # another run's best is none of this one's checkpoints, and its patience may be used up
        return checkpoint.step, Evaluations.from_dict(checkpoint.metadata.get("evaluations") if is_own else None)
    if job.model.resolved_init == "pretrained":
        assert job.model.path
        engine.load_pretrained(model_folder(job.model.path, weights=True))
    return 0, Evaluations()


def _take_best(job: JobConfig, engine: Engine, worker: Worker, step: int, evaluations: Evaluations) -> int:
    """With `checkpoint.keep_best`, the best evaluated weights in place of the last step's (`step`).

    Returns:
        the step that the engine's weights are of now.
    """
    best = evaluations.best_step if job.checkpoint.keep_best else None
    if best is None or best == step:
        return step
    checkpoint = agree_on_step(worker.run_dir / "checkpoints", best, rank=worker.rank, store=worker.store())
    if checkpoint is None:  # of a time when checkpoint.keep_best was not set, or somebody removed it
        log.warning("the best evaluated weights, of step %d, are gone: those of step %d are exported", best, step)
        return step
    engine.load_state_dict(load(checkpoint, engine.sharded_state_dict(is_loading=True)))
    log.info("exports step %d, the best evaluated", best)
    return best


def _message(job: JobConfig, step: int, evaluations: Evaluations, export_step: int | None) -> str:
    """How a run that came to its end did so, where that is not plain."""
    assert job.train.steps is not None, "resolve() fills it"
    words = []
    if step < job.train.steps:
        words.append(f"stopped early: {evaluations.why_exhausted()}")
    if export_step not in (None, step):
        words.append(f"the exported weights are of step {export_step}, the best evaluated")
    return "; ".join(words)


def _metadata(
    job: JobConfig, engine: Engine, step: int, payload: dict[str, Any], evaluations: Evaluations
) -> dict[str, Any]:
    return {
        "step": step,
        "engine": job.engine,
        "consumed_samples": step * job.train.global_batch_size,
        "layout": asdict(engine.layout),
        "hf_config": payload["hf_config"],
        "data_fingerprint": payload["data_fingerprint"],
        "content_metadata": engine.content_metadata,
        "evaluations": evaluations.to_dict(),
        "keep_step": evaluations.best_step if job.checkpoint.keep_best else None,
    }
