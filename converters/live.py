"""Hugging Face weights -> the live Megatron model of one rank, reading only the slices that this rank holds."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from swift_dist.converters.hf_side import UNEQUAL_REMEDY, check_hf_folder
from swift_dist.converters.mapping import Duplicate, Row, TensorMap, duplicates, expand, global_name, slices
from swift_dist.converters.reading import Reader, as_torch
from swift_dist.converters.safetensors_io import HFFolder
from swift_dist.converters.stored import ITEM_SIZES, StoredTensor
from swift_dist.errors import JobError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LiveChunk:
    """One model chunk of a rank (with virtual pipeline stages it has several).

    Args:
        parameters: ``dict(gpt_model.named_parameters())`` of the GPTModel itself, without wrappers; filled in place.
        layer_offset: layers of the whole model before this chunk (``layer.layer_number - 1`` of its first one).
    """

    parameters: Mapping[str, torch.Tensor]
    layer_offset: int = 0


@dataclass(frozen=True)
class Shard:
    """Which part of each matrix a rank holds.

    Args:
        tp_rank, tp_size: tensor parallel, for everything but experts.
        etp_rank, etp_size: expert tensor parallel.
        expert_offset: experts of a layer before this rank's (expert-parallel rank * experts per rank).
    """

    tp_rank: int = 0
    tp_size: int = 1
    etp_rank: int = 0
    etp_size: int = 1
    expert_offset: int = 0


def load_hf_slices(
    chunks: Sequence[LiveChunk], folder: str | Path, rows: Iterable[Row | Duplicate], shard: Shard
) -> int:
    """Fill the live parameters of one rank from a Hugging Face folder. Not collective; every rank reads for itself.

    Values are cast to the parameters' dtype. Vocabulary padding is set to zero. An optimizer that holds copies of the
    parameters (fp32 masters) must be told afterwards: megatron's ``optimizer.reload_model_params()``.

    Returns:
        bytes read.

    Raises:
        JobError: the folder does not hold exactly the configured model (see `check_hf_folder`).
        ValueError: a live parameter that no row describes, or whose shape is not what the shard should be: the model
            was not built from the config that the rows come from.
    """
    rows = tuple(rows)
    tensors = HFFolder(folder, "model.path").tensors
    check_hf_folder(tensors, folder, rows, "model.path")
    repeated = {row.of: row.hf for row in duplicates(rows) if row.hf in tensors}
    reader, num_bytes = Reader(), 0
    filled: set[str] = set()
    for chunk in chunks:
        for name, (parameter, tensor) in _match(chunk, rows, shard).items():
            assert name not in filled, f"{name} is held twice by one rank"
            filled.add(name)
            num_bytes += _fill(parameter, tensor, tensors, repeated, reader)
    reader.close()
    logger.info("read %.1f MiB of weights from %s for %d parameters", num_bytes / 2**20, folder, len(filled))
    return num_bytes


def _match(
    chunk: LiveChunk, rows: tuple[Row | Duplicate, ...], shard: Shard
) -> dict[str, tuple[torch.Tensor, TensorMap]]:
    """Each live parameter of a chunk with the part of a mapping that describes it, by global name."""
    live = {
        global_name(name, chunk.layer_offset, shard.expert_offset): (name, parameter)
        for name, parameter in chunk.parameters.items()
    }
    assert len(live) == len(chunk.parameters), "two live parameters have one global name"
    layers = {int(found[1]) for name in live if (found := re.match(r"decoder\.layers\.(\d+)\.", name))}
    experts = {int(found[1]) for name in live if (found := re.search(r"\.local_experts\.(\d+)\.", name))}
    described = {tensor.name: tensor for tensor in expand(rows, layers, sorted(experts))}
    unknown = live.keys() - described.keys()
    if unknown:
        raise ValueError(f"no row describes these parameters of the model: {sorted(unknown)[:8]}")
    _check_complete(live.keys(), described, layers)
    matched = {}
    for name, (_, parameter) in live.items():
        tensor = described[name]
        rank, size = (shard.tp_rank, shard.tp_size) if tensor.expert is None else (shard.etp_rank, shard.etp_size)
        padded_rows = parameter.shape[0] * size if tensor.padded else None
        part = tensor.shard(rank, size, padded_rows)
        if tuple(parameter.shape) != part.shape:
            raise ValueError(
                f"{name} has shape {list(parameter.shape)}; rank {rank} of {size} needs {list(part.shape)}"
            )
        matched[name] = (parameter, part)
    return matched


def _check_complete(live: Iterable[str], described: Mapping[str, TensorMap], layers: Iterable[int]) -> None:
    """A layer that is held must be held wholly, or weights in the folder would silently not be used."""
    held = set(live)
    lacking = [name for name, tensor in described.items() if tensor.layer is not None and name not in held]
    if lacking:
        raise ValueError(f"the model has layers {sorted(layers)} but not these parameters of theirs: {lacking[:8]}")


@torch.no_grad()
def _fill(
    parameter: torch.Tensor,
    part: TensorMap,
    tensors: Mapping[str, StoredTensor],
    repeated: Mapping[str, str],
    reader: Reader,
) -> int:
    """Copy the pieces of one rank's part of a tensor into the live parameter; returns bytes read."""
    covered, num_bytes = 0, 0
    if part.padded:
        parameter.zero_()
    for piece in part.pieces:
        stored = tensors[piece.hf]
        values = reader.read(stored, piece.hf_box)
        twin = repeated.get(piece.hf)
        if twin and not np.array_equal(reader.read(tensors[twin], piece.hf_box), values):
            raise JobError("model.path", f"{twin} must repeat {piece.hf} in this model, but differs", UNEQUAL_REMEDY)
        parameter[slices(piece.megatron_box)].copy_(as_torch(values))
        covered += values.size
        num_bytes += values.size * ITEM_SIZES[stored.dtype]
    assert part.padded or covered == parameter.numel(), f"{part.name} was not covered exactly once"
    return num_bytes
