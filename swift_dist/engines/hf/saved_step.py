"""A checkpoint of the hf engine as what `from_pretrained` reads, made in one process without any rank or group.

A run writes its weights in that form once, at its end. A checkpoint holds only what learns, under its name in the
model, so the rest comes from the job's own model.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_dist.checkpoint.folder import Checkpoint
from swift_dist.config import JobConfig
from swift_dist.errors import JobError, RunError

if TYPE_CHECKING:
    import torch


def export_checkpoint(checkpoint: Checkpoint, job: JobConfig, folder: Path) -> Path:
    """Write the weights of a checkpoint as `HFEngine.export` would have at that step. The whole model is in memory.

    Args:
        checkpoint: whole, of a run with ``engine: hf``.
        job: of that run.
        folder: appears when it is whole.

    Returns:
        `folder`: of a model, or of an adapter (`TunerStack.saves`).

    Raises:
        JobError: the job's model is not there any more, or is another one than the checkpoint's.
        RunError: the checkpoint cannot be read.
    """
    import torch

    from swift_dist.checkpoint.trusted import safe_types
    from swift_dist.data.templates.exported import exported_tokenizer
    from swift_dist.engines.hf import checkpoint as saving
    from swift_dist.engines.hf.tokenizer import tokenizer_of
    from swift_dist.tuners import find_tuners
    from swift_dist.tuners._export import written_whole

    tuners = find_tuners(job.tuner)
    model = _model(checkpoint, job, tuners)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    learnt = _weights(checkpoint, job, {**dict(model.named_parameters()), **dict(model.named_buffers())}, learning)
    with torch.serialization.safe_globals(safe_types()):
        common = torch.load(checkpoint.path / "common.pt", map_location="cpu", weights_only=True)
    tuners.load_state(model, common["engine"]["tuners"])
    state = {**model.state_dict(keep_vars=True), **learnt}
    rounded = saving.rounded_for_export(job, model)
    weights = {name: rounded(name, state[name].detach()) for name in tuners.exported(model)}
    with written_whole(folder) as new:
        tuners.export(model, weights, new)
        tokenizer = tokenizer_of(job)
        if tokenizer is not None:
            exported_tokenizer(tokenizer, job.template).save_pretrained(new)
    return folder


def _model(checkpoint: Checkpoint, job: JobConfig, tuners: Any) -> Any:
    """The job's model with its tuners, as every rank made it."""
    import torch

    from swift_dist.engines.hf import model as models
    from swift_dist.objectives.base import Objective
    from swift_dist.plugins import find

    objective: Objective = find("swift_dist.objectives", job.objective.resolved_name(job.task), "OBJECTIVE")
    paired = objective.needs == "sequence_scores" and objective.sample == "pair"
    hf_config = dict(checkpoint.metadata.get("hf_config") or {})
    torch.manual_seed(job.train.seed)
    labels = 1 if paired else job.model.num_labels
    base: Any = models.load_base(job, hf_config, objective.needs, tuners, num_labels=labels)
    if job.model.problem_type:
        base.config.problem_type = job.model.problem_type
    return models.apply_tuners(base, tuners, job.train.seed)


def _weights(
    checkpoint: Checkpoint, job: JobConfig, tensors: dict[str, torch.Tensor], learning: set[str]
) -> dict[str, torch.Tensor]:
    """What the checkpoint holds of the model, by name: every weight that learns, and buffers."""
    import torch
    from torch.distributed.checkpoint import load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from swift_dist.checkpoint.safe_reader import SafeFileSystemReader

    reader = SafeFileSystemReader(checkpoint.path)
    try:
        held = {
            key.removeprefix("model."): value
            for key, value in reader.read_metadata().state_dict_metadata.items()
            if key.startswith("model.") and isinstance(value, TensorStorageMetadata)
        }
    except Exception as error:  # the index is damaged, or holds what it must not
        raise RunError(f"{checkpoint.path / '.metadata'} cannot be read: {error}", "use another checkpoint") from None
    wrong = sorted((learning - held.keys()) | (held.keys() - tensors.keys()))
    shapes = {name: tuple(value.size) for name, value in held.items()}
    wrong = wrong or sorted(name for name in held if shapes[name] != tuple(tensors[name].shape))
    if wrong:
        raise JobError(
            "model.path",
            f"{checkpoint.path} does not fit {job.model.path}: {wrong[0]} is in one of them only, or has another shape",
            "restore the model that the run began with",
        )
    found = {f"model.{name}": torch.empty(shapes[name], dtype=held[name].properties.dtype) for name in held}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(found, storage_reader=reader, no_dist=True)
    except Exception as error:  # torch's errors of damaged files have no common base
        raise RunError(f"{checkpoint.path} cannot be read: {error}", "use another checkpoint") from error
    return {name: found[f"model.{name}"] for name in held}
