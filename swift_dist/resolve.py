"""From a job as the user wrote it to one that can run: geometry, layout, data and resume point, all checked.

Everything that can be wrong with a job is found here, before anything is started or written; no torch, no Ray.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_dist.config import DatasetEntry, JobConfig
from swift_dist.config.section import updated
from swift_dist.errors import JobError
from swift_dist.parallel import ModelShape, ParallelLayout

if TYPE_CHECKING:
    from swift_dist.checkpoint import Checkpoint
    from swift_dist.checkpoint.resume import Difference

NOT_GEOMETRY = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"})
"""Entries of a config.json that say nothing about the weights or what is computed with them."""


@dataclass(frozen=True)
class ResolvedJob:
    """A job that passed every check.

    Args:
        job: the job with absolute paths, `train.steps`, `output` and `cluster.nproc_per_node` filled in.
        hf_config: the model's config.json.
        shape: its geometry; None for a model that only transformers knows.
        layout: the parallel layout over all ranks.
        data_fingerprint: identity of the training data (None without data, and before rows are encoded).
        samples: where encoded rows lie (`data.samples.opening` as plain values); None for prepared text.
        encoding: to be entered while the job runs: encodes the rest of streamed rows (`finetune.Rows`).
    """

    job: JobConfig
    hf_config: dict[str, Any]
    shape: ModelShape | None
    layout: ParallelLayout
    data_fingerprint: str | None
    samples: dict[str, Any] | None = None
    encoding: AbstractContextManager[Any] | None = None

    def payload(self) -> dict[str, Any]:
        """What every rank is handed: plain values, so that any transport carries them."""
        from swift_dist.finetune import vocabulary

        return {
            "job": self.job.model_dump(mode="json"),
            "hf_config": self.hf_config,
            "data_fingerprint": self.data_fingerprint,
            "samples": self.samples,
            "vocab_size": self.shape.vocab_size if self.shape else vocabulary(self.hf_config),
        }


def resolve(job: JobConfig, *, nproc_per_node: int, on_cuda: bool, output: str, encode: bool = True) -> ResolvedJob:
    """Check a job against its model and data and fill what was left open.

    Args:
        job: as loaded.
        nproc_per_node: ranks per machine (``cluster.nproc_per_node`` or what the machine offers).
        on_cuda: whether the ranks compute on NVIDIA GPUs.
        output: the run folder.
        encode: fine-tuning: encode the rows now where the cache does not hold them; False leaves `samples` None, and
            train.steps where the job has epochs.

    Raises:
        JobError: with the first thing that is wrong, and its remedy.
    """
    from swift_dist.config.applies import require_read

    require_read(job)
    if job.model.liger and not on_cuda:
        raise JobError("model.liger", "needs an NVIDIA GPU and the package liger-kernel", "leave it out")
    if job.model.liger and job.model.kernels:
        raise JobError("model.kernels", "and model.liger replace the same parts of a model", "give one of them")
    if job.model.kernels and job.train.compile:
        raise JobError(
            "model.kernels", "cannot be compiled: train.compile makes kernels of its own", "give one of them"
        )
    job = absolute_paths(job)
    if job.engine == "megatron":
        resolved = _resolve_megatron(job, nproc_per_node, on_cuda, output)
    else:
        resolved = _resolve_hf(job, nproc_per_node, output, encode)
    job = updated(
        resolved.job,
        output=str(Path(output).absolute()),
        cluster=updated(job.cluster, nproc_per_node=nproc_per_node),
    )
    return replace(resolved, job=job)


def _resolve_megatron(job: JobConfig, nproc_per_node: int, on_cuda: bool, output: str) -> ResolvedJob:
    from swift_dist.engines.megatron import requirements
    from swift_dist.models import find_family, read_hf_config
    from swift_dist.optim.schedule import build_schedule
    from swift_dist.parallel import require_valid

    if job.task != "pretrain":
        raise JobError("engine", f"megatron does not do {job.task} yet", "--engine hf, which is its default")
    requirements.check(job, on_cuda=on_cuda)
    hf_config = read_hf_config(job.model)
    family = find_family(hf_config)
    family.require_trainable()
    shape = family.shape(hf_config)
    if job.model.config is not None:
        family.require_geometry(hf_config)
    layout = ParallelLayout.resolve(
        job.parallel, world_size=job.cluster.nnodes * nproc_per_node, is_moe=shape.num_experts is not None
    )
    require_valid(
        layout,
        shape,
        sequence_length=job.data.sequence_length,
        micro_batch_size=job.train.micro_batch_size,
        global_batch_size=job.train.global_batch_size,
        fp8=job.train.fp8 != "none",
    )
    job, fingerprint = _with_data(job, shape.vocab_size)
    _check_tokenizer(job)
    _check_weights(job, hf_config)
    job = _with_warmup(job, output)
    assert job.train.steps is not None
    build_schedule(job.schedule, peak=job.optimizer.lr, train_steps=job.train.steps)
    return ResolvedJob(job, hf_config, shape, layout, fingerprint)


def _resolve_hf(job: JobConfig, nproc_per_node: int, output: str, encode: bool) -> ResolvedJob:
    from swift_dist.finetune import Rows, check_plugins, known_shape, vocabulary, with_rows
    from swift_dist.models import read_hf_config
    from swift_dist.optim.schedule import build_schedule
    from swift_dist.sequence_parallel.degrees import layout_of

    hf_config = read_hf_config(job.model)
    check_plugins(job)
    reference = None
    if job.objective.reference:
        reference = _config_of_reference(job.objective.reference, job.model.trust_remote_code)
    layout = layout_of(job, hf_config, nproc_per_node, reference)
    per_round = job.train.micro_batch_size * layout.dp
    if job.train.global_batch_size % per_round:
        size, default = job.train.global_batch_size, type(job.train).model_fields["global_batch_size"].default
        raise JobError(
            "train.global_batch_size",
            f"{size}{' (the default)' if size == default else ''} is not a multiple of micro_batch_size "
            f"{job.train.micro_batch_size} x {layout.dp} data-parallel ranks",
            f"use a multiple of {per_round}",
        )
    shards = job.strategy.hybrid_shard_size
    if shards and layout.world_size % shards:
        raise JobError(
            "strategy.hybrid_shard_size",
            f"{shards} does not divide the {layout.world_size} ranks",
            "choose a divisor of the number of ranks (the GPUs of a node), or leave it out",
        )
    if job.task == "pretrain":
        job, fingerprint = _with_data(job, vocabulary(hf_config))
        rows = Rows(fingerprint=fingerprint)
    else:
        job, rows = with_rows(job, hf_config, output, encode)
    _check_tokenizer(job)
    _check_weights(job, hf_config)
    job = _with_warmup(job, output)
    if job.train.steps is not None:
        build_schedule(job.schedule, peak=job.optimizer.lr, train_steps=job.train.steps)
        check_plugins(job)  # tuners may need some number of steps
    shape = known_shape(hf_config)
    return ResolvedJob(job, hf_config, shape, layout, rows.fingerprint, rows.samples, rows.encoding)


def _config_of_reference(path: str, trust_remote_code: bool) -> dict[str, Any]:
    from swift_dist.config import ModelSection
    from swift_dist.models import read_hf_config

    try:
        return read_hf_config(ModelSection(path=path, trust_remote_code=trust_remote_code))
    except JobError as error:
        raise JobError("objective.reference", error.message, error.remedy) from None


def check_resume(resolved: ResolvedJob, run_dir: Path, old_job: Mapping[str, Any]) -> None:
    """Refuse to continue a run with what a resume may not change.

    Args:
        resolved: the new job.
        run_dir: the run folder.
        old_job: its job.yaml.

    Raises:
        JobError: names every difference.
    """
    from swift_dist.checkpoint import newest_whole
    from swift_dist.checkpoint.folder import step_folders
    from swift_dist.checkpoint.resume import require_same_training, resume_difference

    if not step_folders(run_dir / "checkpoints"):
        return  # it ended before its first checkpoint: nothing of it goes on, and a corrected job may start there
    checkpoint = newest_whole(run_dir / "checkpoints")
    origin = checkpoint.metadata if checkpoint else {}
    old, new = {}, {"data": str(resolved.data_fingerprint)}
    if "data_fingerprint" in origin:
        old["data"] = origin["data_fingerprint"]
    if resolved.data_fingerprint is None and resolved.job.task != "pretrain":
        old["data"] = new["data"] = ""  # rows that are not encoded here: who runs the job compares them
    changed: list[Difference] = []
    if "hf_config" in origin:  # name what differs in the geometry rather than print two whole configurations
        changed = _geometry_difference(origin["hf_config"], resolved.hf_config)
        old["model"] = new["model"] = ""
    differences = [*changed, *resume_difference(old_job, resolved.job, old, new)]
    differences = [_with_files(d, old_job, resolved.job) if d.key == "data.train" else d for d in differences]
    require_same_training(differences, run_dir, origin.get("engine", "megatron"))


def _with_files(difference: Difference, old_job: Mapping[str, Any], job: JobConfig) -> Difference:
    """A difference of data, whose fingerprints say nothing to people, with the paths that each job gives."""
    paths = [entry["path"] for entry in old_job["data"]["train"]], [entry.path for entry in job.data.train]
    if not isinstance(difference.old, str):
        return difference  # the entries themselves
    old, new = (", ".join(given) for given in paths)
    return replace(difference, old=f"{old} (content {difference.old})", new=f"{new} (content {difference.new})")


def _geometry_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    from swift_dist.checkpoint.resume import Difference

    keys = sorted((old.keys() | new.keys()) - NOT_GEOMETRY)
    return [Difference(f"model.config.{k}", old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k)]


def absolute_paths(job: JobConfig) -> JobConfig:
    """Every path that exists here made absolute, so that ranks with another working folder find it.

    A model or tokenizer that is not a folder stays as it is: a hub id.
    """

    def local(path: str | None) -> str | None:
        return str(Path(path).absolute()) if path and Path(path).exists() else path

    def entries(items: tuple[DatasetEntry, ...], key: str) -> tuple[DatasetEntry, ...]:
        if job.task == "pretrain":
            return tuple(updated(item, path=str(Path(item.path).absolute())) for item in items)
        from swift_dist.data.rows.paths import absolute_address

        return tuple(updated(item, path=absolute_address(item.path, key)) for item in items)

    return updated(
        job,
        model=updated(job.model, path=local(job.model.path), tokenizer=local(job.model.tokenizer)),
        data=updated(
            job.data,
            train=entries(job.data.train, "data.train"),
            validation=entries(job.data.validation, "data.validation"),
        ),
        checkpoint=updated(job.checkpoint, load=local(job.checkpoint.load)),
        objective=updated(job.objective, reference=local(job.objective.reference)),
        strategy=updated(job.strategy, deepspeed=local(job.strategy.deepspeed)),
    )


def _with_data(job: JobConfig, vocab_size: int | None) -> tuple[JobConfig, str]:
    """Open the data sets: they exist, are whole, fit the vocabulary; how many steps they make, and their identity."""
    from swift_dist.data.loader import TrainingData
    from swift_dist.data.mixture import check_data

    if not job.data.train:
        raise JobError("data.train", "no training data", "swift-dist data prepare makes it; then --dataset PREFIX")
    size = job.train.global_batch_size
    steps = check_data(
        job.data,
        global_batch_size=size,
        steps=job.train.steps,
        vocab_size=vocab_size,
        eval_steps=job.train.eval_steps if job.train.eval_interval else 0,
    )
    data = TrainingData(job.data, seed=job.train.seed, global_batch_size=size, micro_batch_size=1, dp_rank=0, dp_size=1)
    try:
        return updated(job, train=updated(job.train, steps=steps)), data.fingerprint()
    finally:
        data.close()


def _with_warmup(job: JobConfig, output: str) -> JobConfig:
    """schedule.warmup_steps as schedule.warmup_ratio says (rounded up, as transformers does).

    A resume keeps the number of its run: of more steps the same share would be another warm-up. Where rows are not
    encoded here and steps are unknown, it is left to who runs the job.
    """
    from swift_dist.checkpoint.folder import step_folders
    from swift_dist.config.load import read_yaml

    ratio, given = job.schedule.warmup_ratio, job.schedule.warmup_steps
    if not ratio:
        return job
    began = Path(output) / "job.yaml"
    goes_on = began.exists() and step_folders(Path(output) / "checkpoints")
    old = (read_yaml(began).get("schedule") if goes_on else None) or {}
    if old.get("warmup_ratio") == ratio:
        number = old["warmup_steps"]
    elif job.train.steps is not None:
        number = math.ceil(job.train.steps * ratio)
    else:
        return job
    if given not in (0, number):
        message = f"{given}, but schedule.warmup_ratio {ratio:g} is {number} steps"
        raise JobError("schedule.warmup_steps", message, "give one of them")
    return updated(job, schedule=updated(job.schedule, warmup_steps=number))


def _check_tokenizer(job: JobConfig) -> None:
    """It travels with the run into its exports."""
    from swift_dist.data.tokenizer_files import check_local_tokenizer

    if job.model.tokenizer:
        check_local_tokenizer(job.model.tokenizer, "model.tokenizer")


def _check_weights(job: JobConfig, hf_config: Mapping[str, Any]) -> None:
    from swift_dist.checkpoint import open_checkpoint

    folder = Path(job.model.path) if job.model.path and job.model.resolved_init == "pretrained" else None
    if folder and folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise JobError(
            "model.path",
            f"{folder} holds no *.safetensors to start from",
            "--model.init random trains this geometry from scratch",
        )
    load = job.checkpoint.load
    if load and not Path(load).exists():
        raise JobError("checkpoint.load", f"{load} does not exist", "name a run folder or one of its checkpoints")
    if load:
        checkpoint = open_checkpoint(load)
        engine = checkpoint.metadata.get("engine", job.engine)
        if engine != job.engine:
            raise JobError(
                "checkpoint.load",
                f"{checkpoint.path} is of the {engine} engine, and this job's is {job.engine}",
                f"--engine {engine}, or begin with its weights alone: --model.path EXPORT",
            )
        _require_same_model(hf_config, checkpoint)
        _require_same_batch(job, checkpoint)
        _require_steps_left(job, checkpoint)


def _require_steps_left(job: JobConfig, checkpoint: Checkpoint) -> None:
    steps, epochs = job.train.steps, job.train.epochs
    if steps is None or steps > checkpoint.step:
        return  # None: rows that are not encoded here; who runs the job knows
    more = f"--train.steps {checkpoint.step + steps} for {steps} more"
    raise JobError(
        "train.steps" if epochs is None else "train.epochs",
        f"{steps if epochs is None else f'{epochs:g} are {steps} steps'}, but {checkpoint.path} lies at step "
        f"{checkpoint.step}: steps count on from there",
        more if epochs is None else "raise train.epochs, which count from the beginning",
    )


def _require_same_model(hf_config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    changed = _geometry_difference(checkpoint.metadata.get("hf_config", hf_config), hf_config)
    if changed:
        lines = [f"{d.key}: {d.old!r} in the checkpoint, {d.new!r} in this job" for d in changed]
        raise JobError(
            "checkpoint.load",
            f"{checkpoint.path} is another model's:\n  " + "\n  ".join(lines),
            "give the job that model, or leave checkpoint.load out",
        )


def _require_same_batch(job: JobConfig, checkpoint: Checkpoint) -> None:
    """Steps count on from another run's checkpoint, and with them the position in the data."""
    from swift_dist.checkpoint.resume import weights_alone

    samples = checkpoint.metadata.get("consumed_samples")
    size = job.train.global_batch_size
    if samples is not None and samples != checkpoint.step * size:
        raise JobError(
            "train.global_batch_size",
            f"{size}, but {checkpoint.path} was trained with {samples // checkpoint.step}: step {checkpoint.step} "
            "would be another position in the data and in the schedule",
            f"--train.global_batch_size {samples // checkpoint.step}; or begin anew with its weights alone: "
            + weights_alone(checkpoint.path, checkpoint.metadata.get("engine", "megatron")),
        )
