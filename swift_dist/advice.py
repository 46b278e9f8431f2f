"""What is said before a job starts: that nothing is left to do, what begins, what is odd about it. No torch, no Ray."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from swift_dist.checkpoint import newest_whole
from swift_dist.config import JobConfig, ScheduleSection
from swift_dist.config.load import build
from swift_dist.data.manifest import read_manifest
from swift_dist.data.tokenizer_files import check_local_tokenizer
from swift_dist.optim.schedule import build_schedule
from swift_dist.resolve import ResolvedJob
from swift_dist.runs.evaluations import Evaluations
from swift_dist.runs.folder import RunFolder
from swift_dist.runs.outcome import exported
from swift_dist.runs.progress import human_count

log = logging.getLogger(__name__)


def steps_done(folder: RunFolder) -> int:
    """Steps that lie behind the run in `folder`, which a resume goes on from; 0 if there is none."""
    newest = newest_whole(folder.checkpoints) if folder.exists() else None
    return newest.step if newest else 0


def already_done(folder: RunFolder, resolved: ResolvedJob) -> dict[str, Any] | None:
    """The result of a run that has all its steps behind it, or has stopped early; None if there is something to do."""
    newest = newest_whole(folder.checkpoints) if folder.exists() else None
    done, steps = newest.step if newest else 0, resolved.job.train.steps
    if not newest or not done or steps is None:
        return None
    evaluations = Evaluations.from_dict(newest.metadata.get("evaluations"))
    if done < steps and not evaluations.exhausted(resolved.job.train.early_stopping_patience):
        return None
    export, last = exported(folder), (folder.manifest().get("attempts") or [{}])[-1]
    if last.get("state") != "done" and (resolved.job.engine == "hf" or done < steps):
        return None  # it ended before its weights were written; those that are there are of fewer steps
    if resolved.job.engine == "hf" and export is None:
        return None
    more = "train.steps" if done >= steps else "train.early_stopping_patience"
    log.info("%s is at step %d of %d: raise %s to go on", folder.path, done, steps, more)
    status = folder.status()
    loss = status.loss if status else None
    return {
        "state": "done",
        "output": str(folder.path),
        "export": export,
        "export_step": last.get("export_step"),
        "message": last.get("message", "") if last.get("state") == "done" else "",
        "step": done,
        "loss": loss,
        "checkpoint": done,
        "restarts": 0,
    }


def announce(folder: RunFolder, resolved: ResolvedJob, num_cpus: int | None) -> None:
    """Say what begins, and what is odd about it."""
    done, world = steps_done(folder), resolved.layout.world_size
    begins = f"goes on from step {done}" if done else "begins"
    size = f"{human_count(resolved.shape.num_parameters())} parameters, " if resolved.shape else ""
    log.info("%s %s: %s%d rank%s", folder.path, begins, size, world, "s" * (world > 1))
    for line in advice(resolved, folder, num_cpus):
        log.warning("warning: %s", line)


def advice(resolved: ResolvedJob, folder: RunFolder, num_cpus: int | None) -> list[str]:
    """One line for each thing.

    Args:
        resolved: the job.
        folder: where it will run; it may hold a run that goes on.
        num_cpus: cores of this machine, where the ranks will compute on them.
    """
    return [
        *_about_the_model(resolved),
        *_about_the_tokenizer(resolved.job),
        *_about_the_machine(resolved.layout.world_size, num_cpus),
        *_about_the_schedule(resolved, folder),
    ]


def _about_the_model(resolved: ResolvedJob) -> Iterator[str]:
    length, positions = resolved.job.data.sequence_length, resolved.hf_config.get("max_position_embeddings")
    if positions and length > positions:
        yield (
            f"data.sequence_length {length} is beyond the model's max_position_embeddings {positions}, which is what "
            "whoever loads the export will believe"
        )


def _about_the_tokenizer(job: JobConfig) -> Iterator[str]:
    """Whether the one that will travel with exports made the data. (The hash is of the tokenizers library's own text:
    another version of it may give the same tokenizer another hash, so this is no reason to refuse.)"""
    path = job.model.tokenizer
    sha256 = check_local_tokenizer(path, "model.tokenizer") if path else None
    for entry in job.data.train if sha256 and job.task == "pretrain" else ():
        made_with = (read_manifest(entry.path) or {}).get("tokenizer") or {}
        recorded = made_with.get("sha256")
        if recorded and recorded != sha256:
            yield (
                f"model.tokenizer {path} does not look like the one that {entry.path} was prepared with, "
                f"{made_with.get('path')}"
            )


def _about_the_machine(num_ranks: int, num_cpus: int | None) -> Iterator[str]:
    if num_cpus and num_ranks > 2 * num_cpus:
        yield f"{num_ranks} ranks share the {num_cpus} CPU cores of this machine: a long start and slow steps"


def _about_the_schedule(resolved: ResolvedJob, folder: RunFolder) -> Iterator[str]:
    done, job, old = steps_done(folder), resolved.job, folder.job() if folder.exists() else {}
    old_steps = (old.get("train") or {}).get("steps")
    if not done or not old_steps or job.train.steps is None or done >= job.train.steps:
        return
    section = build(ScheduleSection, [old.get("schedule") or {}])
    before = build_schedule(section, peak=job.optimizer.lr, train_steps=old_steps)(done)
    after = build_schedule(job.schedule, peak=job.optimizer.lr, train_steps=job.train.steps)(done)
    if abs(after - before) > 0.01 * job.optimizer.lr:
        yield (
            f"the learning rate jumps at step {done + 1} from {before:.3g} to {after:.3g}: the schedule ends with the "
            f"run, and train.steps was {old_steps}, now {job.train.steps} (--schedule.decay_steps {old_steps} keeps it)"
        )
