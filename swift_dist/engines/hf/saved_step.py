"""A checkpoint of the hf engine as what `from_pretrained` reads, made in one process without any rank or group.

A run writes its weights in that form once, at its end. A checkpoint holds only what learns, under its name in the
model, so the rest comes from the job's own model.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_dist.checkpoint.folder import Checkpoint
from swift_dist.config import JobConfig
from swift_dist.errors import JobError, RunError

if TYPE_CHECKING:
    import torch

    from swift_dist.tuners import TunerStack
    from swift_dist.tuners._stored import Piece, StoredModel

log = logging.getLogger(__name__)

_SHARD_BYTES = 5_000_000_000  # as `HFEngine.export` has it
_OF_THE_BASE = ("full", "freeze", "lisa")  # tuners under which a weight has the base's name, whether it learns or not


def export_checkpoint(checkpoint: Checkpoint, job: JobConfig, folder: Path) -> Path:
    """Write the weights of a checkpoint as `HFEngine.export` would have at that step.

    One weight is in memory at a time (of an adapter: the adapter). Where the job's tuner or its model does not allow
    that, the whole model is, and a warning says why.

    Args:
        checkpoint: whole, of a run with ``engine: hf``.
        job: of that run.
        folder: appears when it is whole.

    Returns:
        `folder`: of a model, or of an adapter (`TunerStack.saves`).

    Raises:
        JobError: the job's model is not there any more, or is another one than the checkpoint's.
        RunError: the checkpoint cannot be read; the disk has no room.
    """
    from swift_dist.data.templates.exported import exported_tokenizer
    from swift_dist.engines.hf.tokenizer import tokenizer_of
    from swift_dist.tuners import find_tuners
    from swift_dist.tuners._export import written_whole
    from swift_dist.tuners._stored import NotStreamed

    tuners = find_tuners(job.tuner)
    with written_whole(folder) as new:
        try:
            _require_no_values(job, tuners)
            model = _model(checkpoint, job, tuners, on_meta=True)
            write = _write_adapter if tuners.saves == "adapter" else _write_streamed
            write(checkpoint, job, tuners, model, new)
        except NotStreamed as reason:
            log.warning("the whole model is held in memory to export this checkpoint: %s", reason)
            for file in new.iterdir():
                file.unlink()
            _write_adapter(checkpoint, job, tuners, _model(checkpoint, job, tuners, on_meta=False), new)
        tokenizer = tokenizer_of(job)
        if tokenizer is not None:
            exported_tokenizer(tokenizer, job.template).save_pretrained(new)
    return folder


def _require_no_values(job: JobConfig, tuners: TunerStack) -> None:
    """Raises NotStreamed where what is exported follows from the values of weights that do not learn."""
    from swift_dist.tuners import lora
    from swift_dist.tuners._stored import NotStreamed

    tuner, options = tuners.main
    if tuners.load_arguments():
        raise NotStreamed("its base is quantised as it is loaded")
    if isinstance(options, lora.Options) and lora.changes_base(options):
        raise NotStreamed(f"{options.init} takes the adapter's first values out of the base's")
    if tuners.saves == "model" and tuner.name not in _OF_THE_BASE:
        raise NotStreamed(f"under {tuner.name} a weight need not be the base's of that name")


def _write_adapter(checkpoint: Checkpoint, job: JobConfig, tuners: TunerStack, model: Any, new: Path) -> None:
    """All that is exported at once: an adapter, or a whole model that has values.

    Raises:
        NotStreamed: something of it is not in the checkpoint, and the model has no values.
    """
    import torch

    from swift_dist.checkpoint.trusted import safe_types
    from swift_dist.engines.hf import checkpoint as saving
    from swift_dist.tuners._stored import NotStreamed

    saved = _Saved(checkpoint, job, model)
    learnt = saved.read(saved.held)
    with torch.serialization.safe_globals(safe_types()):
        common = torch.load(checkpoint.path / "common.pt", map_location="cpu", weights_only=True)
    state = {**model.state_dict(keep_vars=True), **learnt}
    names = tuners.exported(model)
    lacking = [name for name in names if state[name].is_meta]
    if lacking:
        raise NotStreamed(f"the checkpoint does not hold {lacking[0]}")
    tuners.load_state(model, common["engine"]["tuners"])
    rounded = saving.rounded_for_export(job, model)
    tuners.export(model, {name: rounded(name, state[name].detach()) for name in names}, new)


def _write_streamed(checkpoint: Checkpoint, job: JobConfig, tuners: TunerStack, model: Any, new: Path) -> None:
    """A whole model, a weight after the other: of the checkpoint, or of the base where it has not learnt.

    Raises:
        NotStreamed: a weight is in neither; transformers converts them only all together.
    """
    from swift_dist.engines.hf import checkpoint as saving
    from swift_dist.tuners import _stored

    saved, rounded = _Saved(checkpoint, job, model), saving.rounded_for_export(job, model)
    tied, state = _stored.tied_weights(model), model.state_dict()
    of_alias = {kept: alias for alias, kept in tied.items() if alias in saved.held and kept not in saved.held}
    names = [name for name in state if name not in tied]
    frozen = [name for name in names if name not in saved.held and name not in of_alias]
    base = _base(job, model, frozen) if frozen else None
    blank = {name: saved.blank(of_alias.get(name, name)) if name not in frozen else state[name] for name in names}
    weights = {name: rounded(name, tensor) for name, tensor in blank.items()}

    def source(piece: Piece) -> _stored.Source:
        def make() -> dict[str, torch.Tensor]:
            ours = {name: of_alias.get(name, name) for name in piece.names if name not in frozen}
            read = saved.read(ours.values())
            values = {name: read[held] for name, held in ours.items()}
            if base is not None and len(ours) < len(piece.names):
                found = base.read(name for name in piece.names if name in frozen)
                values |= {name: found[name].to(state[name].dtype) for name in piece.names if name in frozen}
            return _stored.stored_form(model, {name: rounded(name, values[name]) for name in piece.names})

        return _stored.Source(piece.specs, None, make)

    pieces = _stored.pieces_of(model, weights)
    _stored.write_tensors(new, [source(piece) for piece in pieces], _SHARD_BYTES)
    _stored.write_config(model, new, _stored.most_common_dtype(weights.values()))


def _base(job: JobConfig, model: Any, frozen: list[str]) -> StoredModel:
    from swift_dist.converters.safetensors_io import HFFolder
    from swift_dist.models import model_folder
    from swift_dist.tuners._stored import NotStreamed, StoredModel

    if not job.model.path or job.model.resolved_init != "pretrained":
        raise NotStreamed(f"{frozen[0]} has not learnt, and has been in no file")
    base = StoredModel(HFFolder(model_folder(job.model.path, weights=True), "model.path"), model)
    state = model.state_dict()
    for name in frozen:
        if name not in base.weights or base.weights[name].shape != state[name].shape:
            raise NotStreamed(f"{name} is neither in the checkpoint nor in {job.model.path}")
    return base


def _model(checkpoint: Checkpoint, job: JobConfig, tuners: TunerStack, *, on_meta: bool) -> Any:
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
    base: Any = models.load_base(job, hf_config, objective.needs, tuners, num_labels=labels, on_meta=on_meta)
    if job.model.problem_type:
        base.config.problem_type = job.model.problem_type
    return models.apply_tuners(base, tuners, job.train.seed, on_meta=on_meta)


class _Saved:
    """What a checkpoint holds of a model, by name: every weight that learns, and buffers.

    Attributes:
        held: their names.

    Raises:
        JobError: it is another model's. RunError: its index cannot be read.
    """

    def __init__(self, checkpoint: Checkpoint, job: JobConfig, model: Any) -> None:
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        from swift_dist.checkpoint.safe_reader import SafeFileSystemReader

        self._path, self._reader = checkpoint.path, SafeFileSystemReader(checkpoint.path)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        try:
            self.held: dict[str, Any] = {
                key.removeprefix("model."): value
                for key, value in self._reader.read_metadata().state_dict_metadata.items()
                if key.startswith("model.") and isinstance(value, TensorStorageMetadata)
            }
        except Exception as error:  # the index is damaged, or holds what it must not
            raise RunError(
                f"{checkpoint.path / '.metadata'} cannot be read: {error}", "use another checkpoint"
            ) from None
        held = self.held
        wrong = sorted((learning - held.keys()) | (held.keys() - tensors.keys()))
        wrong = wrong or sorted(name for name in held if tuple(held[name].size) != tuple(tensors[name].shape))
        if wrong:
            raise JobError(
                "model.path",
                f"{checkpoint.path} does not fit {job.model.path}: {wrong[0]} is in one of them only, or has another "
                "shape",
                "restore the model that the run began with",
            )

    def blank(self, name: str, device: str = "meta") -> torch.Tensor:
        """A tensor of a weight's shape and dtype."""
        import torch

        held = self.held[name]
        return torch.empty(tuple(held.size), dtype=held.properties.dtype, device=device)

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Raises RunError where the files are damaged."""
        from torch.distributed.checkpoint import load
        from torch.distributed.checkpoint.api import CheckpointException

        found = {f"model.{name}": self.blank(name, "cpu") for name in names}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
                if found:
                    load(found, storage_reader=self._reader, no_dist=True)
        except CheckpointException as error:  # no Exception is its base, and its text is a traceback
            reason = next(iter(error.failures.values()))[0]
            raise RunError(f"{self._path} cannot be read: {reason}", "use another checkpoint") from error
        except Exception as error:  # torch's errors of damaged files have no common base
            raise RunError(f"{self._path} cannot be read: {error}", "use another checkpoint") from error
        return {name: found[f"model.{name}"] for name in names}
