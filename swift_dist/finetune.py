"""What is particular to resolving a fine-tuning job: its plug-ins exist and fit, its rows are encoded. No torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_dist.config import JobConfig
from swift_dist.config.section import updated
from swift_dist.errors import JobError
from swift_dist.parallel import ModelShape
from swift_dist.plugins import UnknownPlugin, find
from swift_dist.tuners import find_tuners

if TYPE_CHECKING:
    from swift_dist.data.samples.store import SampleKind

log = logging.getLogger(__name__)

SFT_OBJECTIVES = ("causal_lm", "classification", "token_classification")


def check_plugins(job: JobConfig) -> None:
    """The job's tuners, objective and strategy exist and go together.

    Raises:
        JobError: one does not, with the reason.
    """
    objective = _objective(job)
    find_tuners(job.tuner).refuse(_strategy(job))
    if job.task == "sft" and objective.name not in SFT_OBJECTIVES and ":" not in (job.objective.name or ""):
        raise JobError("objective.name", f"{objective.name} learns from preferences", "swift-dist rlhf")
    if job.task == "rlhf" and objective.name in SFT_OBJECTIVES:
        raise JobError("objective.name", f"{objective.name} does not learn from preferences", "swift-dist sft")
    if job.objective.reference and not objective.needs_reference(getattr(job.objective, objective.name, None)):
        raise JobError("objective.reference", f"{objective.name} needs no reference model", "leave it out")
    _check_head(job, objective.name)
    if job.strategy.deepspeed:
        from swift_dist.engines.hf.strategies import _deepspeed_config

        _deepspeed_config.check(job)


def _check_head(job: JobConfig, objective: str) -> None:
    """What is said of a head that classifies is read."""
    kind = sample_kind(job)
    read = {"classification": ("num_labels", "problem_type"), "token_classification": ("num_labels",)}.get(kind, ())
    for name in ("num_labels", "problem_type"):
        if getattr(job.model, name) is not None and name not in read:
            raise JobError(
                f"model.{name}",
                f"{getattr(job.model, name)!r} has no effect: objective.name is {objective}",
                "--objective.name classification, or leave it out",
            )


def _objective(job: JobConfig) -> Any:
    return _found("swift_dist.objectives", job.objective.resolved_name(job.task), "OBJECTIVE", "objective.name")


def _strategy(job: JobConfig) -> Any:
    """The strategy as tuners are asked about it."""
    if not job.strategy.deepspeed:
        return job.strategy.name
    from swift_dist.engines.hf.strategies import _deepspeed_config

    stage = (_deepspeed_config.read(job).get("zero_optimization") or {}).get("stage", 0)
    return f"zero{stage}" if stage else "ddp"


def _found(room: str, name: str, attribute: str, key: str) -> Any:
    try:
        return find(room, name, attribute)
    except UnknownPlugin as error:
        raise JobError(key, str(error), f"--{key} {(error.suggestions or error.known)[0]}") from None


def known_shape(hf_config: Mapping[str, Any]) -> ModelShape | None:
    """The geometry, where the model is of a family that this project describes."""
    from swift_dist.models import find_family

    try:
        return find_family(hf_config).shape(dict(hf_config))
    except JobError:
        return None


def cache_folder(job: JobConfig, output: str) -> Path:
    """Where encoded rows lie: seen by all nodes where the run folder is."""
    return Path(job.data.cache).absolute() if job.data.cache else Path(output).absolute().parent / ".cache"


def with_rows(
    job: JobConfig, hf_config: Mapping[str, Any], output: str, encode: bool
) -> tuple[JobConfig, dict[str, Any] | None, str | None]:
    """The job with train.steps, where its encoded rows lie, and their fingerprint.

    Raises:
        JobError: no rows, none that can be used, or neither steps nor epochs.
    """
    from swift_dist.data.samples.encode import encode_samples
    from swift_dist.data.samples.opening import open_samples, stores_as_values
    from swift_dist.data.samples.store import check_labels, check_vocabulary

    if not job.data.train:
        raise JobError("data.train", "no training data", "--dataset FILE of rows, or a hub id")
    if classifies(job) and job.model.num_labels is None:
        job = updated(job, model=updated(job.model, num_labels=_num_labels(hf_config)))
    if job.train.steps is None and job.train.epochs is None:
        job = updated(job, train=updated(job.train, epochs=1.0))
    if not encode:
        return job, None, None
    kind, cache = sample_kind(job), cache_folder(job, output)
    train = encode_samples(job, kind, cache)
    validation = encode_samples(job, kind, cache, key="data.validation") if job.data.validation else []
    size = vocabulary(hf_config)
    if size is not None:
        check_vocabulary(train, size)
        check_vocabulary(validation, size, "data.validation")
    if classifies(job):
        assert job.model.num_labels is not None
        for key, stores in (("data.train", train), ("data.validation", validation)):
            check_labels(stores, job.model.num_labels, job.model.problem_type, key)
    samples = stores_as_values(train, validation)
    data = open_samples(samples, job, dp_rank=0, dp_size=1, layout="padded", pad_id=0)
    try:
        steps, fingerprint = data.num_steps, data.fingerprint()
        if job.train.eval_interval:
            data.validation_batches(1)  # there is something to evaluate on
    finally:
        data.close()
    if job.train.epochs is not None:
        if job.train.steps not in (None, steps):
            raise JobError(
                "train.steps",
                f"{job.train.steps}, but train.epochs {job.train.epochs:g} are {steps} steps",
                "give one of them",
            )
        log.info("%g epochs are %d steps", job.train.epochs, steps)
        job = updated(job, train=updated(job.train, steps=steps))
    return job, samples, fingerprint


def vocabulary(hf_config: Mapping[str, Any]) -> int | None:
    """Token ids that the model knows; of a model with several parts, its text part's."""
    return hf_config.get("vocab_size") or (hf_config.get("text_config") or {}).get("vocab_size")


def _num_labels(hf_config: Mapping[str, Any]) -> int:
    """Outputs of a classification head by its config.json, whose default is transformers'."""
    return len(hf_config.get("id2label") or ()) or hf_config.get("num_labels") or 2


def classifies(job: JobConfig) -> bool:
    """Whether rows have labels that outputs of the model's head stand for (a reward's head has one output)."""
    return sample_kind(job) in ("classification", "token_classification")


def sample_kind(job: JobConfig) -> SampleKind:
    """What a row becomes (`Objective.sample`, or a sequence with a label)."""
    objective = _objective(job)
    if objective.needs == "sequence_scores" and objective.sample == "single":
        return "classification"
    if objective.needs == "token_scores":
        return "token_classification"
    return objective.sample
