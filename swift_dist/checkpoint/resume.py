"""What a resume may change, key by key.

A resume goes on with the same training: the same model, data, order, batch, objective, optimizer and schedule. How
it is carried out may change: layout, machines, intervals, reports, and how many steps there are.

Changes of the learning rate, weight decay and their like are refused, too: a curve made with two settings says so
only if it is two runs. To change them, start another run from this one's checkpoint (``checkpoint.load: <folder>`` with
another ``output``). ``train.steps`` and ``schedule.decay_steps`` are free; a schedule that ends with the run then moves
its end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from swift_dist.config import JobConfig
from swift_dist.config.section import Section
from swift_dist.errors import JobError


class Rule(Enum):
    FREE = "may change"
    FIXED = "must stay"
    MODEL = "may be written differently if the model is the same"
    DATA = "may be written differently if the data are the same"


def job_keys(section: type[Section] = JobConfig, prefix: str = "") -> list[str]:
    """Every dotted key of a job, in the order in which they are declared."""
    keys = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            keys += job_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


RULES: dict[str, Rule] = {
    "task": Rule.FIXED,
    "engine": Rule.FIXED,  # its own parameter names and optimizer state
    "output": Rule.FREE,  # a run folder may be moved
    "resume": Rule.FREE,
    "model.path": Rule.MODEL,
    "model.config": Rule.MODEL,
    "model.init": Rule.FIXED,  # where the weights came from
    "model.tokenizer": Rule.FREE,  # travels with exports only
    "model.trust_remote_code": Rule.FREE,
    "model.attention": Rule.FREE,  # computes the same
    "model.num_labels": Rule.FIXED,
    "model.problem_type": Rule.FREE,  # must be what the labels are
    "model.liger": Rule.FREE,
    "model.kernels": Rule.FREE,
    "data.train": Rule.DATA,
    "data.validation": Rule.FREE,  # never reaches the weights
    "data.sequence_length": Rule.FIXED,
    "data.mask_eod_loss": Rule.FIXED,  # the objective
    "data.separate_documents": Rule.FIXED,  # what is computed
    "data.prefetch": Rule.FREE,
    "data.format": Rule.FREE,  # in the fingerprint of the rows
    "data.columns": Rule.FREE,  # likewise
    "data.split_ratio": Rule.FIXED,  # what is held out would be trained on
    "data.bad_rows": Rule.FREE,
    "data.packing": Rule.FIXED,  # the order
    "data.padding_free": Rule.FREE,
    "data.group_by_length": Rule.FIXED,  # the order
    "data.streaming": Rule.FIXED,  # the order
    "data.workers": Rule.FREE,
    "data.cache": Rule.FREE,
    "train.steps": Rule.FREE,
    "train.epochs": Rule.FREE,  # as train.steps
    "train.early_stopping_patience": Rule.FREE,
    "train.compile": Rule.FREE,
    "train.micro_batch_size": Rule.FREE,  # the sum over a global batch is the same
    "train.global_batch_size": Rule.FIXED,
    "train.seed": Rule.FIXED,
    "train.precision": Rule.FIXED,
    "train.fp8": Rule.FIXED,
    "train.recompute": Rule.FREE,
    "train.eval_interval": Rule.FREE,
    "train.eval_steps": Rule.FREE,
    "train.eval_answers": Rule.FREE,
    "train.eval_answer_tokens": Rule.FREE,
    "train.log_interval": Rule.FREE,
    "train.nan_policy": Rule.FREE,  # what a stop advises to change
    "train.spike_factor": Rule.FREE,
    "train.spike_policy": Rule.FREE,
    "train.max_skipped": Rule.FREE,
    "train.initial_loss_scale": Rule.FREE,  # the scale itself is in the checkpoint
    "optimizer.name": Rule.FIXED,
    "optimizer.lr": Rule.FIXED,
    "optimizer.weight_decay": Rule.FIXED,
    "optimizer.decay_norm_and_bias": Rule.FIXED,
    "optimizer.betas": Rule.FIXED,
    "optimizer.eps": Rule.FIXED,
    "optimizer.momentum": Rule.FIXED,
    "optimizer.clip_grad": Rule.FIXED,
    "schedule.name": Rule.FIXED,
    "schedule.warmup_steps": Rule.FIXED,
    "schedule.warmup_ratio": Rule.FREE,  # a number of steps by then, which a resume keeps
    "schedule.decay_steps": Rule.FREE,  # goes with train.steps; wsd: when to begin the decay is decided late
    "schedule.min_lr_ratio": Rule.FIXED,
    "parallel.tensor_model_parallel_size": Rule.FREE,
    "parallel.pipeline_model_parallel_size": Rule.FREE,
    "parallel.virtual_pipeline_model_parallel_size": Rule.FREE,
    "parallel.context_parallel_size": Rule.FREE,
    "parallel.ulysses_size": Rule.FREE,
    "train.tiled_loss": Rule.FREE,
    "train.tiled_mlp": Rule.FREE,
    "train.offload_activations": Rule.FREE,
    "parallel.expert_model_parallel_size": Rule.FREE,
    "parallel.expert_tensor_parallel_size": Rule.FREE,
    "parallel.sequence_parallel": Rule.FREE,
    "parallel.use_distributed_optimizer": Rule.FIXED,  # the optimizer's state has other names
    "parallel.overlap_grad_reduce": Rule.FREE,
    "parallel.overlap_param_gather": Rule.FREE,
    "checkpoint.interval": Rule.FREE,
    "checkpoint.keep": Rule.FREE,
    "checkpoint.keep_every": Rule.FREE,
    "checkpoint.async_save": Rule.FREE,
    "checkpoint.keep_best": Rule.FREE,
    "checkpoint.export_dtype": Rule.FREE,
    "checkpoint.load": Rule.FIXED,  # it would not be read again: the run has its own checkpoints by now
    # a checkpoint names each weight by itself, however it was spread over the ranks
    **{key: Rule.FREE for key in job_keys() if key.startswith("strategy.")},
    # the objective
    **{key: Rule.FIXED for key in job_keys() if key.startswith(("template.", "tuner.", "objective."))},
    "template.date": Rule.FREE,  # in the fingerprint of the rows, where it is written into them
    "objective.precompute_reference": Rule.FREE,  # the same numbers, sooner
    # where it runs, how it gets there and what is told of it never reach the weights
    **{key: Rule.FREE for key in job_keys() if key.startswith(("cluster.", "launch.", "report."))},
}


@dataclass(frozen=True)
class Difference:
    """A key whose change a resume refuses. `old` and `new` are plain JSON values (fingerprints for model and data)."""

    key: str
    old: Any
    new: Any


def resume_difference(
    old_job: JobConfig | Mapping[str, Any],
    new_job: JobConfig | Mapping[str, Any],
    old_fingerprints: Mapping[str, str] | None = None,
    new_fingerprints: Mapping[str, str] | None = None,
) -> list[Difference]:
    """What keeps `new_job` from resuming `old_job`; empty if nothing does.

    Args:
        old_job, new_job: as ``JobConfig`` or as the mapping in a run folder's job.yaml.
        old_fingerprints, new_fingerprints: hashes of the ``model`` (its configuration) and the training ``data``. Where
            both jobs have one, it decides; else the keys that name the model or data must be written alike.
    """
    old, new = _plain(old_job), _plain(new_job)
    old_fingerprints, new_fingerprints = old_fingerprints or {}, new_fingerprints or {}
    found = []
    for key, rule in RULES.items():
        if rule is Rule.FREE:
            continue
        subject = {Rule.MODEL: "model", Rule.DATA: "data"}.get(rule)
        if subject and subject in old_fingerprints and subject in new_fingerprints:
            before, after = old_fingerprints[subject], new_fingerprints[subject]
        else:
            before, after = _value(old, key), _value(new, key)
        if before != after:
            found.append(Difference(key, before, after))
    return found


_LOAD_REFUSES = ("model.", "train.global_batch_size", "optimizer.name", "parallel.use_distributed_optimizer")
"""Keys that `checkpoint.load` cannot change either."""


def weights_alone(folder: Any, engine: str) -> str:
    """How to begin with the weights of a run or checkpoint in `folder`, and with nothing else of it."""
    if engine == "hf":
        return "--model.path its export, the folder model; or what swift-dist merge makes of its adapter"
    return f"--model.path DIR after swift-dist convert megatron-to-hf {folder} DIR"


def require_same_training(differences: list[Difference], folder: Any, engine: str = "megatron") -> None:
    """Raise JobError if there are `differences` between the job and the run of `engine` in `folder`."""
    if differences:
        first = differences[0]
        refused = [d.key for d in differences if d.key.startswith(_LOAD_REFUSES)]
        go_on = f"--checkpoint.load {folder} to go on from its checkpoint"
        if refused:
            go_on = f"for its weights alone {weights_alone(folder, engine)}"
        lines = [f"{d.key}: {json.dumps(d.old)} in {folder}, {json.dumps(d.new)} in this job" for d in differences]
        raise JobError(
            first.key,
            "a resume cannot change it:\n  " + "\n  ".join(lines),
            f"put the old value back, or start another run with another --output (and {go_on})",
        )


def _plain(job: JobConfig | Mapping[str, Any]) -> dict[str, Any]:
    """`job` as plain JSON values, with the defaults of keys that it does not have (an older version's job.yaml)."""
    values = job.model_dump(mode="json") if isinstance(job, JobConfig) else dict(job)
    defaults = JobConfig().model_dump(mode="json")
    merged = {
        name: {**default, **(values.get(name) or {})} if isinstance(default, dict) else values.get(name, default)
        for name, default in defaults.items()
    }
    return json.loads(json.dumps(merged))


def _value(job: dict[str, Any], key: str) -> Any:
    value: Any = job
    for name in key.split("."):
        value = value[name]
    if key == "model.init" and value is None:
        return "pretrained" if job["model"]["path"] else "random"
    return value
