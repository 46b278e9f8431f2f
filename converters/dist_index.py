"""torch_dist checkpoints (torch.distributed.checkpoint, as megatron-core writes it) as stored tensors. No torch.

The index, ``.metadata``, is a pickle of torch's ``Metadata``: shapes and chunks by key, and for each chunk the file,
offset and length of an archive of torch.save. It is read with inert placeholders (`torch_files`): nothing in it runs.

Three styles of keys are read:

    per layer       decoder.layers.3.mlp.linear_fc1.weight                     what our engine and new Megatron-LM write
    homogeneous     decoder.layers.mlp.linear_fc1.weight [layers, ...]         all layers in one tensor
    singleton       ...linear_fc1.weight_w and _v; ...experts.5.linear_fc1...  metadata singleton_local_shards

(megatron/core/transformer: transformer_block.py ``sharded_state_dict``; mlp.py ``apply_swiglu_sharded_factory``;
moe/experts.py ``SequentialMLP.sharded_state_dict``.)
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from swift_dist.converters.mapping import Box, Duplicate, Row, TensorMap, box_size, checkpoint_key, weights
from swift_dist.converters.plan import Hold
from swift_dist.converters.stored import BY_TORCH, FLOATS, Extent, StoredTensor, covers
from swift_dist.converters.torch_files import fields_of, load_inert, name_of
from swift_dist.errors import JobError, listed

METADATA_NAME = ".metadata"
_STATE_KEY = re.compile(r"^(chained_\d+\.)?(optimizer|opt_param_scheduler|rng_state|rerun_state)|_extra_state(/|$)")
_LAYER = re.compile(r"(\blayers\.)(\d+)\.")
_EXPERT = re.compile(r"(\.experts\.)local_experts\.(\d+)\.")


def is_weight(key: str) -> bool:
    """Whether a key of a checkpoint names a weight: all that is not the state of an optimizer, a generator or FP8."""
    return _STATE_KEY.search(key) is None


def dist_index(folder: str | os.PathLike[str], key: str = "source") -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint, the optimizer's included, by its key.

    Raises:
        JobError: the index cannot be read, or names a file that is missing or too short.
    """
    file = Path(folder) / METADATA_NAME
    try:
        with file.open("rb") as stream:
            index = fields_of(load_inert(stream))
        return _tensors(Path(folder), index)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise JobError(key, f"{file} cannot be read: {error}", "use another checkpoint") from None


def _tensors(folder: Path, index: Mapping[str, Any]) -> dict[str, StoredTensor]:
    places: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    for where, info in index["storage_data"].items():
        entry = fields_of(where)
        offset = entry.get("offset")
        places[entry["fqn"], _sizes(offset)] = fields_of(info)
    lengths: dict[str, int] = {}
    found = {}
    for name, described in index["state_dict_metadata"].items():
        if not name_of(described).endswith(".TensorStorageMetadata"):
            continue
        described = fields_of(described)
        dtype = BY_TORCH[name_of(described["properties"].state[0]).rpartition(".")[2]]
        extents = [_extent(folder, name, fields_of(chunk), places, lengths, dtype) for chunk in described["chunks"]]
        found[name] = StoredTensor(name, _sizes(described["size"]), dtype, tuple(extents))
    return found


def _extent(folder: Path, name: str, chunk: dict[str, Any], places: Any, lengths: dict[str, int], dtype: str) -> Extent:
    offsets, sizes = _sizes(chunk["offsets"]), _sizes(chunk["sizes"])
    place = places[name, offsets]
    if place.get("transform_descriptors"):
        raise ValueError(f"{name} is stored with {place['transform_descriptors']}, which is not read")
    file = str(place["relative_path"])
    if Path(file).name != file:
        raise ValueError(f"{name} lies in {file}, outside the folder")
    if file not in lengths:
        path = folder / file
        if not path.is_file():
            raise ValueError(f"it names {file}, which is missing")
        lengths[file] = path.stat().st_size
    offset, length = int(place["offset"]), int(place["length"])
    if offset < 0 or length <= 0 or offset + length > lengths[file]:
        raise ValueError(f"{file} has {lengths[file]} bytes; {name} would end at byte {offset + length}")
    box = tuple((start, start + extent) for start, extent in zip(offsets, sizes, strict=True))
    return Extent(str(folder / file), offset, box, archive=length)


def _sizes(size: Any) -> tuple[int, ...]:
    """A torch.Size: a placeholder called with a tuple."""
    if size is None:
        return ()
    return tuple(int(extent) for extent in (size.args[0] if hasattr(size, "args") else size))


class DistSide:
    """The weights of a torch_dist checkpoint, whatever the style of its keys.

    Args:
        tensors: of the whole checkpoint (`dist_index`), or of the layout of a new one.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._all = tensors
        self._prefix = "module." if any(key.startswith("module.decoder.") for key in tensors) else ""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return self._all

    def weights(self) -> list[str]:
        """Keys that are weights of a model, and not optimizer state."""
        return [key for key in self._all if is_weight(key)]

    def hold(self, tensor: TensorMap) -> list[Hold]:
        """Raises KeyError: no key of any style holds the tensor."""
        key, expert = checkpoint_key(tensor.name)
        layer = int(found[2]) if (found := _LAYER.search(key)) else None
        whole = tuple((0, extent) for extent in tensor.shape)
        for name, lead in _candidates(self._prefix, tensor.name, key, layer, expert):
            if name in self._all:
                return [Hold(name, (*lead, *whole), whole)]
            if f"{name}_w" in self._all and f"{name}_v" in self._all:
                half = tensor.shape[0] // 2
                rest = whole[1:]
                return [
                    Hold(f"{name}_{part}", (*lead, (0, half), *rest), ((k * half, (k + 1) * half), *rest))
                    for k, part in enumerate("wv")
                ]
        raise KeyError(key)


def _candidates(prefix: str, name: str, key: str, layer: int | None, expert: int | None) -> list[tuple[str, Box]]:
    """(key, leading dimensions) under which a tensor may be stored, in the order in which they are tried."""
    single = _EXPERT.sub(r"\1experts.\2.", name)
    found: list[tuple[str, Box]] = [(key, () if expert is None else ((expert, expert + 1),))]
    if expert is not None:
        found.append((single, ()))
    if layer is not None:
        stacked = ((layer, layer + 1),)
        found += [(_LAYER.sub(r"\1", other, count=1), (*stacked, *lead)) for other, lead in list(found)]
    return [(prefix + other, lead) for other, lead in found]


def check_dist(side: DistSide, rows: Iterable[Row | Duplicate], key: str = "source") -> list[str]:
    """Compare a checkpoint with a model's rows: every tensor there in its shape, and no weight that no row describes.

    Returns:
        keys of what is not weights: optimizer state and the like.

    Raises:
        JobError: naming what is missing, unexpected, or of another shape.
    """
    problems: list[str] = []
    used: dict[str, int] = {}
    padded: set[str] = set()
    for tensor in weights(rows):
        try:
            holds = side.hold(tensor)
        except KeyError:
            problems.append(f"missing: {checkpoint_key(tensor.name)[0]} {list(tensor.shape)}")
            continue
        for hold in holds:
            if hold.name not in used:
                problems += _misfits(side.tensors[hold.name], hold, tensor)
            elif any(stop > bound for (_, stop), bound in zip(hold.box, side.tensors[hold.name].shape, strict=False)):
                problems.append(f"{hold.name}: shape {list(side.tensors[hold.name].shape)} has no {tensor.name}")
            used[hold.name] = used.get(hold.name, 0) + box_size(hold.box)
            if tensor.padded:
                padded.add(hold.name)
    for name in sorted(used.keys() - padded):  # of layers or experts stored together, the model may have fewer
        if (held := side.tensors[name].num_elements) > used[name] and not problems:
            problems.append(f"{name}: {held} elements, of which the model of its config has {used[name]}")
    unused = [name for name in side.weights() if name not in used]
    problems += [f"mapped by no row: {name} {list(side.tensors[name].shape)}" for name in sorted(unused)]
    if problems:
        raise JobError(
            key,
            f"the checkpoint does not hold the model of its config:\n  {listed(problems)}",
            "give the config.json that the checkpoint was trained with: --hf_config PATH",
        )
    return sorted(side.tensors.keys() - used.keys())


def _misfits(stored: StoredTensor, hold: Hold, tensor: TensorMap) -> list[str]:
    """What is wrong with a stored tensor, if anything. A padded one may have more rows."""
    lead = len(hold.box) - len(hold.at)
    shape, wanted = stored.shape[lead:], tuple(stop for _, stop in hold.box[lead:])
    fits = len(stored.shape) == len(hold.box) and shape == wanted
    if tensor.padded and len(shape) == len(wanted):
        fits = shape[0] >= wanted[0] and shape[1:] == wanted[1:]
    if not fits:
        return [
            f"{stored.name}: shape {list(stored.shape)}, the model's config says {list(tensor.shape)} for {tensor.name}"
        ]
    if stored.dtype not in FLOATS:
        return [f"{stored.name}: stored as {stored.dtype}, not as plain floats"]
    if not covers(stored.extents, stored.shape):
        return [f"{stored.name}: its chunks do not make up the tensor"]
    return []
