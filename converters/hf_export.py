"""torch_dist checkpoint -> safetensors: what goes where (from the index alone), then one tensor after another."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from swift_dist.converters.dist_checkpoint_io import DistCheckpoint
from swift_dist.converters.mapping import Box, Row, TensorMap, checkpoint_key, expand, hf_shapes, slices
from swift_dist.converters.safetensors_io import ShardedWriter, TensorSpec, plan_shards
from swift_dist.errors import JobError, RunError

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MODEL_KEY = re.compile(r"^(embedding|decoder|output_layer|mtp)\.")
_STACKED = re.compile(r"^decoder\.layers\.[a-z]")  # no layer number: all layers in one tensor
_PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class Read:
    """One read of the checkpoint and the mapping that says what it holds.

    Args:
        box: the part of the stored tensor: without vocabulary padding, one expert of those stored together.
    """

    key: str
    box: Box
    tensor: TensorMap


@dataclass(frozen=True)
class ExportPlan:
    """Everything that an export will read and write, known from the index alone.

    Args:
        reads: in the order of layers, so that the written files are filled one after another.
        specs: the Hugging Face tensors, in the order of layers.
        ignored: tensors of the checkpoint that are no weights (optimizer state).
    """

    reads: tuple[Read, ...]
    specs: tuple[TensorSpec, ...]
    ignored: int

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.specs)

    @property
    def num_parameters(self) -> int:
        return sum(spec.num_bytes // spec.dtype.itemsize for spec in self.specs)


def plan_export(checkpoint: DistCheckpoint, rows: Iterable[Row], dtype: torch.dtype | None) -> ExportPlan:
    """Match a checkpoint's tensors with a family's rows.

    Args:
        dtype: of the written weights; None: as stored.

    Raises:
        JobError: a tensor is missing, has another shape, or is mapped by no row; all of them are named.
    """
    rows = tuple(rows)
    problems: list[str] = []
    reads: list[Read] = []
    dtypes: dict[str, torch.dtype] = {}
    used: set[str] = set()
    for tensor in expand(rows):
        if tensor.tied_copy:
            continue
        key, expert = checkpoint_key(tensor.name)
        used.add(key)
        problem = _misfit(checkpoint, key, expert, tensor)
        if problem:
            problems.append(problem)
            continue
        box = tuple((0, extent) for extent in tensor.shape)
        reads.append(Read(key, box if expert is None else ((expert, expert + 1), *box), tensor))
        stored = checkpoint.tensors[key].dtype
        dtypes.update((piece.hf, dtype or stored) for piece in tensor.pieces)
    others = sorted(checkpoint.tensors.keys() - used)
    problems += [f"mapped by no row: {key}" for key in others if _MODEL_KEY.match(key)]
    if problems:
        raise _wrong_model(checkpoint, problems)
    specs = [TensorSpec(name, shape, dtypes[name]) for name, shape in hf_shapes(rows).items()]
    return ExportPlan(
        reads=tuple(sorted(reads, key=lambda read: _natural(read.tensor.pieces[0].hf))),
        specs=tuple(sorted(specs, key=lambda spec: _natural(spec.name))),
        ignored=len(others),
    )


def _misfit(checkpoint: DistCheckpoint, key: str, expert: int | None, tensor: TensorMap) -> str | None:
    """What is wrong with a stored tensor, if anything. A padded one may have more rows."""
    info = checkpoint.tensors.get(key)
    if info is None:
        return f"missing: {key} {list(tensor.shape)}"
    shape = info.shape if expert is None else info.shape[1:]
    fits = shape == tensor.shape
    if tensor.padded and len(shape) == len(tensor.shape):
        fits = shape[0] >= tensor.shape[0] and shape[1:] == tensor.shape[1:]
    if expert is not None and expert >= info.shape[0]:
        fits = False
    if not fits:
        return f"{key}: shape {list(info.shape)}, the model's config says {list(tensor.shape)} for {tensor.name}"
    if not info.dtype.is_floating_point or info.dtype.itemsize < 2:
        return f"{key}: stored as {info.dtype}, not as plain floats"
    return None


def _wrong_model(checkpoint: DistCheckpoint, problems: list[str]) -> JobError:
    if any(_STACKED.match(key) for key in checkpoint.tensors):
        return JobError(
            "source",
            f"{checkpoint.folder} holds all layers stacked in one tensor (homogeneous layers), which is not read yet",
            "save with per-layer keys: metadata={'non_homogeneous_layers': True}",
        )
    unique = list(dict.fromkeys(problems))
    shown = "\n  ".join(unique[:8]) + (f"\n  and {len(unique) - 8} more" if len(unique) > 8 else "")
    return JobError(
        "source",
        f"{checkpoint.folder} does not hold the model of its config:\n  {shown}",
        "give the config.json that the checkpoint was trained with: --hf_config PATH",
    )


def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key: numbers by value; the embedding before the layers, and they before what comes last in the model."""
    rank = 0 if "embed" in name else 1 if ".layers." in name else 2
    parts = re.split(r"(\d+)", name)
    return ((0, rank), *((1, int(part)) if part.isdigit() else (2, part) for part in parts))


def write_export(plan: ExportPlan, checkpoint: DistCheckpoint, folder: Path, max_shard_size: int) -> list[str]:
    """Write the weights into an existing folder; one stored tensor and its parts are in memory at a time.

    Returns:
        the names of the weight files.

    Raises:
        RunError: the checkpoint cannot be read to its end, or a value does not fit the target dtype.
        OSError: the target cannot be written.
    """
    shards = plan_shards(plan.specs, max_shard_size)
    targets = {spec.name: spec for spec in plan.specs}
    writer = ShardedWriter(folder, shards)
    try:
        done, reported = 0, time.monotonic()
        for read in plan.reads:
            for name, part in _convert(_stored(checkpoint, read), read.tensor, targets).items():
                writer.write(name, part)
                done += targets[name].num_bytes
            if time.monotonic() - reported > _PROGRESS_SECONDS:
                reported = time.monotonic()
                logger.info("written %.2f of %.2f GiB", done / 2**30, plan.num_bytes / 2**30)
        writer.close()
    except BaseException:
        writer.abort()
        raise
    return list(shards)


def _stored(checkpoint: DistCheckpoint, read: Read) -> torch.Tensor:
    """The stored tensor in the shape that the mapping speaks of."""
    try:
        return checkpoint.read(read.key, read.box).reshape(read.tensor.shape)
    except (OSError, ValueError, RuntimeError, EOFError) as error:
        raise RunError(
            f"{read.key} cannot be read from {checkpoint.folder}: {error}", "the checkpoint is damaged: use another one"
        ) from None


def _convert(stored: torch.Tensor, tensor: TensorMap, targets: dict[str, TensorSpec]) -> dict[str, torch.Tensor]:
    """The Hugging Face tensors that a Megatron tensor consists of, in their target dtype."""
    parts: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    for piece in tensor.pieces:
        spec = targets[piece.hf]
        part = parts.setdefault(piece.hf, torch.empty(spec.shape, dtype=spec.dtype))
        values = stored[slices(piece.megatron_box)]
        part[slices(piece.hf_box)] = values
        counts[piece.hf] = counts.get(piece.hf, 0) + values.numel()
    for name, part in parts.items():
        assert counts[name] == part.numel(), f"{name} comes from more than one Megatron tensor"
        if part.dtype == torch.float16 and torch.isinf(part).any() and not torch.isinf(stored).any():
            raise RunError(f"{name} has values beyond float16's range", "use --dtype bf16 or fp32")
    return parts
