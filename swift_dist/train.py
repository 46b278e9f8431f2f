"""THE page of a rank: layout -> data -> engine -> loop. Runs the same under the Ray gang and under torchrun."""

from __future__ import annotations

import importlib
import logging
import time
from dataclasses import asdict
from typing import Any

from swift_dist.checkpoint import Checkpoint, CheckpointWriter, load, newest_whole, open_checkpoint
from swift_dist.config import JobConfig
from swift_dist.data.loader import TrainingData
from swift_dist.engines import Engine, build_engine
from swift_dist.errors import RunError
from swift_dist.models import find_family, model_folder
from swift_dist.runs.guard import GuardError
from swift_dist.runs.recorder import Recorder
from swift_dist.runs.worker import Worker

log = logging.getLogger(__name__)


def warm(payload: dict[str, Any]) -> None:
    """Import what `main` will need: ranks do so side by side before they meet, spares while they wait."""
    if payload["job"]["engine"] == "megatron":
        from swift_dist.engines.megatron import cpu_shim

        cpu_shim.apply()
        for name in ("groups", "model", "optimizer", "rng", "settings", "state", "step", "weights"):
            importlib.import_module(f"swift_dist.engines.megatron.{name}")


def main(payload: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Train to `train.steps`, or to a requested stop; resume from the run folder's newest whole checkpoint.

    Args:
        payload: ``ResolvedJob.payload()``.
        worker: this rank.

    Returns:
        ``{"step", "loss", "stopped", "checkpoint"}``, the same on every rank.
    """
    job = JobConfig.model_validate(payload["job"])
    worker.beat("build", 0)
    engine = build_engine(job, payload["hf_config"], worker)
    try:
        return _train(job, engine, worker, {k: payload[k] for k in ("hf_config", "data_fingerprint")})
    finally:
        engine.close()


def _train(job: JobConfig, engine: Engine, worker: Worker, origin: dict[str, Any]) -> dict[str, Any]:
    steps = job.train.steps
    assert steps is not None, "resolve() fills it"
    data = TrainingData(
        job.data,
        seed=job.train.seed,
        global_batch_size=job.train.global_batch_size,
        micro_batch_size=job.train.micro_batch_size,
        dp_rank=engine.data.dp_rank,
        dp_size=engine.data.dp_size,
        needs_data=engine.data.needs_data,
        vocab_size=find_family(origin["hf_config"]).shape(origin["hf_config"]).vocab_size,
    )
    writer = CheckpointWriter(
        worker.run_dir / "checkpoints",
        keep=job.checkpoint.keep,
        keep_every=job.checkpoint.keep_every,
        attempt=worker.attempt,
        async_save=job.checkpoint.async_save,
    )
    worker.beat("load", 0)
    step = _start(job, engine, worker)
    recorder = Recorder(job, worker, engine.flops_per_token, first_step=step)
    loss, saved, stop = None, step, False
    try:
        while step < steps and not stop:
            worker.beat("step", step)
            started = time.perf_counter()
            result = engine.train_step(data.micro_batches(step), step, stop=worker.stop_requested())
            step, loss, stop = step + 1, result.loss, result.stop
            recorder.step(step, result, seconds=time.perf_counter() - started, data_wait=data.wait_seconds)
            writer.poll()
            if job.train.eval_interval and (step % job.train.eval_interval == 0 or step == steps):
                worker.beat("eval", step)
                recorder.evaluation(step, engine.evaluate(data.validation_batches(job.train.eval_steps)))
            due = job.checkpoint.interval and step % job.checkpoint.interval == 0
            if due or stop or step == steps:
                worker.beat("save", step)
                writer.save(step, engine.sharded_state_dict(), _metadata(job, engine, step, origin))
                saved = step
        worker.beat("final", step)
        writer.wait()
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
    return {"step": step, "loss": loss, "stopped": stop and step < steps, "checkpoint": saved}


def _start(job: JobConfig, engine: Engine, worker: Worker) -> int:
    """Weights and state to begin with; returns the number of steps already done."""
    checkpoint = _agree_on_checkpoint(job, worker)
    if checkpoint is not None:
        engine.load_state_dict(load(checkpoint, engine.sharded_state_dict(is_loading=True)))
        log.info("goes on from %s", checkpoint.path)
        return checkpoint.step
    if job.model.resolved_init == "pretrained":
        assert job.model.path
        engine.load_pretrained(model_folder(job.model.path, weights=True))
    return 0


def _agree_on_checkpoint(job: JobConfig, worker: Worker) -> Checkpoint | None:
    """The run's newest whole checkpoint, else `checkpoint.load`, else none.

    Rank 0 looks and the others follow: on a shared file system two ranks may see different folders at one moment.
    """
    store = worker.store()
    if worker.rank == 0:
        found = newest_whole(worker.run_dir / "checkpoints")
        if found is None and job.checkpoint.load:
            found = open_checkpoint(job.checkpoint.load)
        store.set("resume_from", str(found.path) if found else "")
    path = store.get("resume_from").decode()
    return open_checkpoint(path) if path else None


def _metadata(job: JobConfig, engine: Engine, step: int, origin: dict[str, Any]) -> dict[str, Any]:
    return {
        "step": step,
        "consumed_samples": step * job.train.global_batch_size,
        "layout": asdict(engine.layout),
        **origin,
        "content_metadata": engine.content_metadata,
    }
