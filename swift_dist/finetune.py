"""What is particular to resolving a fine-tuning job: its plug-ins exist and fit, its rows are encoded. No torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_dist.config import JobConfig
from swift_dist.config.applies import key_that_packs, reason_for_padding
from swift_dist.config.load import read_yaml
from swift_dist.config.section import updated
from swift_dist.errors import JobError
from swift_dist.parallel import ModelShape
from swift_dist.plugins import UnknownPlugin, find
from swift_dist.tuners import find_tuners

if TYPE_CHECKING:
    from swift_dist.config import ModelSection
    from swift_dist.data.samples.store import SampleKind, SampleStore

log = logging.getLogger(__name__)

SFT_OBJECTIVES = ("causal_lm", "classification", "token_classification")


def check_plugins(job: JobConfig) -> None:
    """The job's tuners, objective and strategy exist and go together.

    Raises:
        JobError: one does not, with the reason.
    """
    objective = _objective(job)
    tuners, strategy = find_tuners(job.tuner), _strategy(job)
    tuners.refuse(strategy)
    tuners.check(job)
    if job.checkpoint.export_dtype and tuners.saves == "adapter":
        raise JobError(
            "checkpoint.export_dtype",
            f"has no effect: {tuners.main[0].name} saves an adapter, as it was trained",
            "leave it out; swift-dist merge writes a model in the dtype of its base",
        )
    if job.optimizer.name == "muon" and strategy == "fsdp2":
        raise JobError(
            "optimizer.name",
            "muon orthogonalises whole matrices, and fsdp2 leaves each rank a part of every matrix",
            "leave out strategy.fsdp, or use optimizer.name: adamw",
        )
    if job.task == "sft" and objective.name not in SFT_OBJECTIVES and ":" not in (job.objective.name or ""):
        raise JobError("objective.name", f"{objective.name} learns from preferences", "swift-dist rlhf")
    if job.task == "rlhf" and objective.name in SFT_OBJECTIVES:
        raise JobError("objective.name", f"{objective.name} does not learn from preferences", "swift-dist sft")
    options = getattr(job.objective, objective.name, None)
    if job.objective.reference and not objective.needs_reference(options):
        raise JobError("objective.reference", f"{objective.name} needs no reference model", "leave it out")
    if job.objective.precompute_reference and not objective.needs_reference(options):
        raise JobError("objective.precompute_reference", f"{objective.name} needs no reference model", "leave it out")
    if job.train.eval_answers and objective.needs != "tokens":
        raise JobError("train.eval_answers", f"a model of {objective.name} gives scores, not text", "leave it out")
    if job.objective.precompute_reference and job.data.streaming:
        raise JobError(
            "objective.precompute_reference",
            "its pass reads all samples before the first step, and data.streaming begins with the first of them",
            "give one of them",
        )
    _check_head(job, objective.name)
    reason = reason_for_padding(job, objective.needs)
    key = key_that_packs(job)
    if reason and key:
        raise JobError(key, reason, f"leave out {key}")
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


@dataclass(frozen=True)
class Rows:
    """What became of a job's rows.

    Args:
        samples: where they lie encoded, as plain values (`data.samples.opening`); fingerprint: of the training data.
        encoding: encodes what is left while it is entered (data.streaming).
    """

    samples: dict[str, Any] | None = None
    fingerprint: str | None = None
    encoding: AbstractContextManager[Any] | None = None


def with_rows(job: JobConfig, hf_config: Mapping[str, Any], output: str, encode: bool) -> tuple[JobConfig, Rows]:
    """The job with train.steps, and its rows; they are not opened if not `encode`.

    Raises:
        JobError: no rows, none that can be used, or neither steps nor epochs.
    """
    if not job.data.train:
        raise JobError("data.train", "no training data", "--dataset FILE of rows, or a hub id")
    if classifies(job):
        job = updated(job, model=_with_head(job, hf_config))
    if job.data.streaming:
        from swift_dist.data.samples.streaming import require_streamable

        require_streamable(job)
    elif job.train.steps is None and job.train.epochs is None:
        job = updated(job, train=updated(job.train, epochs=1.0))
    job = _with_date(job, output)
    if not encode:
        from swift_dist.data.samples.encode import check_first_rows

        for key in ("data.train", "data.validation"):
            check_first_rows(job, sample_kind(job), key)
        return job, Rows()
    return _with_stream(job, hf_config, output) if job.data.streaming else _with_whole_rows(job, hf_config, output)


def _with_date(job: JobConfig, output: str) -> JobConfig:
    """The date that chat templates write is the one on which the run began: a resume goes on with the same samples."""
    if job.template.date is not None:
        return job
    began = Path(output) / "job.yaml"
    old = read_yaml(began).get("template") if began.exists() else None
    day = (old or {}).get("date") or date.today().isoformat()
    return updated(job, template=updated(job.template, date=day))


def _encoded(job: JobConfig, hf_config: Mapping[str, Any], output: str, key: str) -> list[SampleStore]:
    """The stores of data.train or data.validation, whose tokens and labels the model has."""
    from swift_dist.data.samples.encode import encode_samples
    from swift_dist.data.samples.store import check_labels, check_vocabulary

    if key == "data.validation" and not job.data.validation:
        return []
    stores = encode_samples(job, sample_kind(job), cache_folder(job, output), key=key)
    size = vocabulary(hf_config)
    if size is not None:
        check_vocabulary(stores, size, key)
    if classifies(job):
        assert job.model.num_labels is not None
        check_labels(stores, job.model.num_labels, job.model.problem_type, key)
    return stores


def _with_stream(job: JobConfig, hf_config: Mapping[str, Any], output: str) -> tuple[JobConfig, Rows]:
    from swift_dist.data.samples.opening import stream_as_values
    from swift_dist.data.samples.streaming import open_stream

    if job.train.eval_interval and not job.data.validation:
        raise JobError("data.validation", "no dataset given", "give data.validation")
    plan, encoding = open_stream(job, sample_kind(job), cache_folder(job, output), output, vocabulary(hf_config))
    validation = _encoded(job, hf_config, output, "data.validation")
    return job, Rows(stream_as_values(plan, validation), plan.fingerprint(), encoding)


def _with_whole_rows(job: JobConfig, hf_config: Mapping[str, Any], output: str) -> tuple[JobConfig, Rows]:
    from swift_dist.data.samples.opening import open_samples, stores_as_values

    train, validation = (_encoded(job, hf_config, output, key) for key in ("data.train", "data.validation"))
    if sample_kind(job) == "classification" and job.model.problem_type is None:
        job = updated(job, model=updated(job.model, problem_type=_problem_type(train[0], job.model.num_labels)))
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
    return job, Rows(samples, fingerprint)


def vocabulary(hf_config: Mapping[str, Any]) -> int | None:
    """Token ids that the model knows; of a model with several parts, its text part's."""
    return hf_config.get("vocab_size") or (hf_config.get("text_config") or {}).get("vocab_size")


def _with_head(job: JobConfig, hf_config: Mapping[str, Any]) -> ModelSection:
    """The head as the job says, else as config.json does (without a word there: two outputs, as transformers)."""
    found = len(hf_config.get("id2label") or ()) or hf_config.get("num_labels") or 2
    model, changes = job.model, {}
    if model.num_labels is None:
        changes["num_labels"] = found
    if model.problem_type is None and model.num_labels in (None, found) and sample_kind(job) == "classification":
        changes["problem_type"] = hf_config.get("problem_type")  # another number of outputs is another head
    return updated(model, **changes)


def _problem_type(store: SampleStore, num_labels: int | None) -> str:
    """What labels that `check_labels` found sound are. The export's config.json says it, too: pipelines make answers
    of scores by it."""
    if store.facts["labels"] == "list":
        return "multi_label_classification"
    return "regression" if num_labels == 1 else "single_label_classification"


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
