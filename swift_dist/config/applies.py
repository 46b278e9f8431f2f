"""Which keys a task reads. A key that is set and that nothing would read is refused: it is never ignored."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from swift_dist.config.job import JobConfig
from swift_dist.config.keys import walk
from swift_dist.errors import JobError

_OF_ROWS = "format columns split_ratio bad_rows packing padding_free group_by_length streaming workers cache"
_ROWS = tuple(f"data.{name}" for name in _OF_ROWS.split())
_OF_FINE_TUNING = "template. tuner. objective. train.epochs train.eval_answer model.num_labels model.problem_type"
_FINE_TUNING = (*_OF_FINE_TUNING.split(), *_ROWS)
_TEXT = ("data.mask_eod_loss", "data.separate_documents")
_MEGATRON = (
    *(f"parallel.{name}" for name in ("tensor_", "pipeline_", "virtual_", "expert_", "sequence_", "use_", "overlap_")),
    "train.fp8",
)
_HF = (
    "parallel.ulysses_size",
    "train.tiled_loss",
    "train.tiled_mlp",
    "train.offload_activations",
    "strategy.",
    "train.compile",
    "model.attention",
    "model.liger",
    "model.kernels",
    "checkpoint.export_dtype",
)

NOT_READ: dict[tuple[str, str], tuple[str, ...]] = {
    ("pretrain", "megatron"): (*_FINE_TUNING, *_HF),
    ("pretrain", "hf"): (*_FINE_TUNING, *_MEGATRON),
    ("sft", "hf"): (*_MEGATRON, *_TEXT),
    ("rlhf", "hf"): (*_MEGATRON, *_TEXT),
}
"""(task, engine) -> keys, or sections with their point, that it does not read."""


def require_read(job: JobConfig) -> None:
    """Refuse a key that differs from its default and that nothing in this job would read.

    Raises:
        JobError: naming it.
    """
    defaults = JobConfig(task=job.task, engine=job.engine)
    unread = NOT_READ.get((job.task, job.engine or ""), ())
    for key in walk(JobConfig):
        if not key.name.startswith(unread) or not unread:
            continue
        value = _value(job, key.name)
        if value != _value(defaults, key.name):
            reader = _who_reads(key.name)
            raise JobError(
                key.name,
                f"{value!r} has no effect on {job.task} with the {job.engine} engine",
                f"leave it out{reader and f'; {reader} reads it'}",
            )
    _require_strategy(job)
    _require_chosen(job)
    _require_conditions(job, defaults)


_CONDITIONS: tuple[tuple[str, Callable[[JobConfig], bool], str], ...] = (
    ("checkpoint.keep_best", lambda job: job.train.eval_interval > 0, "train.eval_interval"),
    ("train.early_stopping_patience", lambda job: job.train.eval_interval > 0, "train.eval_interval"),
    ("data.validation", lambda job: job.train.eval_interval > 0 or job.task == "pretrain", "train.eval_interval"),
    ("train.eval_answers", lambda job: job.train.eval_interval > 0, "train.eval_interval"),
    ("train.eval_answer_tokens", lambda job: job.train.eval_answers > 0, "train.eval_answers"),
    ("data.split_ratio", lambda job: job.train.eval_interval > 0, "train.eval_interval"),
    ("train.spike_policy", lambda job: job.train.spike_factor is not None, "train.spike_factor"),
    ("train.initial_loss_scale", lambda job: job.train.precision == "fp16", "train.precision: fp16"),
    ("optimizer.betas", lambda job: job.optimizer.name != "sgd", "optimizer.name: adamw or muon"),
    ("optimizer.eps", lambda job: job.optimizer.name != "sgd", "optimizer.name: adamw or muon"),
    ("optimizer.momentum", lambda job: job.optimizer.name != "adamw", "optimizer.name: sgd or muon"),
    (
        "parallel.ulysses_size",
        lambda job: job.parallel.context_parallel_size > 1,
        "parallel.context_parallel_size above 1",
    ),
    ("train.offload_activations", lambda job: job.train.recompute == "full", "train.recompute: full"),
    ("schedule.min_lr_ratio", lambda job: job.schedule.name != "constant", "a schedule.name that decays"),
)
"""(key, what of the job makes something read it, what the job lacks otherwise). (A pretraining's validation data may
stand in a job file that does not evaluate yet: nothing is encoded for them.)"""


def _require_conditions(job: JobConfig, defaults: JobConfig) -> None:
    if job.engine == "hf" and job.train.recompute == "selective":
        raise JobError("train.recompute", "'selective' is the megatron engine's alone", "--train.recompute full")
    if job.train.tiled_mlp and job.train.compile:
        raise JobError("train.tiled_mlp", "its tiles are not compiled", "leave out train.tiled_mlp or train.compile")
    for key, is_read, wanted in _CONDITIONS:
        value = _value(job, key)
        if value != _value(defaults, key) and not is_read(job):
            shown = [entry.path for entry in value] if key == "data.validation" else value
            raise JobError(key, f"{shown!r} has no effect without {wanted}", f"give {wanted}, or leave it out")


def key_that_packs(job: JobConfig) -> str | None:
    """The key of a job that asks for rows of sequences that do not see one another; None: none does."""
    asking = {
        "data.packing": job.data.packing,
        "data.padding_free": job.data.padding_free,
        "data.separate_documents": job.data.separate_documents,
        "parallel.context_parallel_size": job.parallel.context_parallel_size > 1,
    }
    return next((key for key, asks in asking.items() if asks), None)


def reason_for_padding(job: JobConfig, needs: str) -> str | None:
    """Why the job's sequences cannot lie side by side in one row, whatever its model; None: that depends on the model.

    Args:
        needs: of its objective.
    """
    if needs != "tokens":
        return "a classification head reads one sequence from each row"
    if job.model.attention:
        return f"model.attention {job.model.attention} does not keep packed sequences apart"
    if job.task == "pretrain" and job.parallel.context_parallel_size == 1 and not job.data.separate_documents:
        return "pretraining's samples are as long as the row"
    return None


def _require_strategy(job: JobConfig) -> None:
    """What only FSDP2 reads is not given to another strategy, nor a disk to what is no DeepSpeed."""
    readers = {
        "fsdp": ("reshard_after_forward", "hybrid_shard_size", "cpu_offload"),
        "deepspeed": ("nvme_path",),
    }
    defaults = type(job.strategy)()
    for strategy, names in readers.items():
        for name in names:
            value = getattr(job.strategy, name)
            if value != getattr(defaults, name) and not getattr(job.strategy, strategy):
                remedy = {"fsdp": "--fsdp fsdp2", "deepspeed": "--deepspeed zero3_nvme"}[strategy]
                raise JobError(
                    f"strategy.{name}",
                    f"{value!r} has no effect without strategy.{strategy}",
                    f"{remedy}, or leave it out",
                )


def _value(job: JobConfig, name: str) -> Any:
    value: Any = job
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _who_reads(name: str) -> str:
    return ", ".join(
        f"{task} with --engine {engine}" for (task, engine), keys in NOT_READ.items() if not name.startswith(keys)
    )


def _require_chosen(job: JobConfig) -> None:
    """The options of a tuner or objective that the job does not name are read by nobody either."""
    if job.task == "pretrain":
        return
    for room, names in (("tuner", job.tuner.name), ("objective", (job.objective.resolved_name(job.task),))):
        section = getattr(job, room)
        for plugin in type(section).model_fields:
            options = getattr(section, plugin)
            if not hasattr(options, "model_fields_set") or plugin in names or options == type(options)():
                continue
            changed = next(n for n in type(options).model_fields if getattr(options, n) != getattr(type(options)(), n))
            raise _not_chosen(job, room, plugin, changed)


def require_chosen_words(job: JobConfig, words: Iterable[str]) -> None:
    """The same of what the command line says, defaults too: who types --lora_rank 8 expects LoRA.

    Args:
        job: the job.
        words: names of keys.
    """
    if job.task == "pretrain":
        return
    for word in words:
        room, _, rest = word.partition(".")
        plugin, _, option = rest.partition(".")
        chosen = {"tuner": job.tuner.name, "objective": (job.objective.resolved_name(job.task),)}.get(room)
        if option and chosen is not None and plugin not in chosen:
            raise _not_chosen(job, room, plugin, option)


def _not_chosen(job: JobConfig, room: str, plugin: str, option: str) -> JobError:
    section = getattr(job, room)
    names = job.tuner.name if room == "tuner" else (job.objective.resolved_name(job.task),)
    alike = [name for name in names if hasattr(getattr(section, name, None), option)]
    return JobError(
        f"{room}.{plugin}.{option}",
        f"has no effect: {room}.name is {' '.join(names)}",
        f"--{room}.{alike[0]}.{option}" if alike else f"--{room}.name {plugin}, or leave it out",
    )
