"""Hugging Face weight folders: what lies where in safetensors (or .bin) files, and the layout of new ones.

Only headers are read here. They are checked before anything relies on them: a file must hold exactly the bytes that its
header describes.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swift_dist.converters.stored import ITEM_SIZES, Extent, StoredTensor
from swift_dist.errors import JobError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_BIN_INDEX, _BIN_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
_MAX_HEADER = 100_000_000  # safetensors' own limit
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
_SCALE = "_scale_inv"  # factors of a weight: <weight>_scale_inv
_SCALE_DTYPES = ("F32", "BF16", "F16")  # DeepSeek-V3's; Qwen3's; those of Qwen3's of July 2025


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is going to be written. `dtype`: safetensors' name."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class FileLayout:
    """A file that is going to be written.

    Args:
        literals: (offset, bytes) of all that is not a tensor's values.
    """

    name: str
    size: int
    literals: tuple[tuple[int, bytes], ...] = ()


@dataclass(frozen=True)
class Layout:
    """All weight files of a target, and its tensors with their places in them (paths relative to the target)."""

    files: tuple[FileLayout, ...]
    tensors: Mapping[str, StoredTensor]


class HFFolder:
    """The tensors of a folder: ``*.safetensors`` (one file, or several with an index), else ``pytorch_model*.bin``.

    Attributes:
        tensors: by name. Block-quantised weights carry their factors, which are then not listed on their own.
        files: names of the weight files.

    Args:
        key: of the option that errors name.

    Raises:
        JobError: no weights; a file that the index names is missing; a file that is not whole, or whose header does not
            describe it; the index and the files disagree.
    """

    def __init__(self, folder: str | os.PathLike[str], key: str = "source") -> None:
        self.folder, self._key = Path(folder), key
        self.files, weight_map = self._find_files()
        found: dict[str, StoredTensor] = {}
        for file in self.files:
            for name, stored in self._read_file(file).items():
                if name in found:
                    raise self._wrong(f"{name} is in {Path(found[name].extents[0].file).name} and in {file}")
                found[name] = stored
        if weight_map is not None:
            self._check_index(weight_map, found)
        self.tensors = self._with_scales(found)

    def _wrong(self, problem: str, remedy: str = "download the model again") -> JobError:
        return JobError(self._key, f"{self.folder}: {problem}", remedy)

    def _find_files(self) -> tuple[list[str], dict[str, str] | None]:
        if not self.folder.is_dir():
            raise JobError(self._key, f"{self.folder} is not a folder", "give a Hugging Face model folder")
        for index, pattern in ((INDEX_NAME, "*.safetensors"), (_BIN_INDEX, "pytorch_model*.bin")):
            if (self.folder / index).is_file():
                return self._indexed_files(self.folder / index)
            files = sorted(path.name for path in self.folder.glob(pattern))
            if len(files) == 1 or SINGLE_NAME in files:
                return [SINGLE_NAME if SINGLE_NAME in files else files[0]], None
            if files:
                raise self._wrong(f"holds {len(files)} {pattern} files and no {index}", "add the index")
        raise self._wrong("holds no *.safetensors or pytorch_model*.bin files", "give a Hugging Face model folder")

    def _indexed_files(self, index: Path) -> tuple[list[str], dict[str, str]]:
        try:
            weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            files = sorted(set(weight_map.values()))
            if not all(isinstance(file, str) for file in files):
                raise ValueError("weight_map does not name files")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._wrong(f"{index.name} cannot be read: {error}") from None
        for file in files:
            if Path(file).name != file:
                raise self._wrong(f"{index.name} names {file}, outside the folder", "restore the file")
            if not (self.folder / file).is_file():
                raise self._wrong(f"{index.name} names {file}, which is missing", "download the model completely")
        single = SINGLE_NAME if index.name == INDEX_NAME else _BIN_SINGLE
        if (self.folder / single).is_file() and single not in files:
            raise self._wrong(
                f"holds {single} and an index of other files: which is the model?", "remove one of the two"
            )
        return files, weight_map

    def _check_index(self, weight_map: Mapping[str, str], found: Mapping[str, StoredTensor]) -> None:
        for name, file in weight_map.items():
            stored = found.get(name)
            if stored is None or Path(stored.extents[0].file).name != file:
                raise self._wrong(f"the index says that {name} is in {file}, which does not hold it")
        unlisted = sorted(found.keys() - weight_map.keys())
        if unlisted:
            raise self._wrong(f"{unlisted[0]} is in a file but not in the index ({len(unlisted)} such tensors)")

    def _read_file(self, file: str) -> dict[str, StoredTensor]:
        path = self.folder / file
        try:
            if path.suffix == ".bin":
                return read_bin(path)
            return read_safetensors(path)
        except (OSError, ValueError) as error:
            raise self._wrong(f"{file} is not a whole weight file: {error}") from None

    def _with_scales(self, found: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Join fp8 weights with their factors; the blocks are those that this folder's own config.json states."""
        quantised = {name for name, stored in found.items() if stored.dtype.startswith("F8")}
        block = self._block_size() if quantised else (0, 0)
        joined = {}
        for name, stored in found.items():
            if name.endswith(_SCALE) and name.removesuffix(_SCALE) in quantised:
                continue  # factors of anything else belong to no row, which is found when the rows are compared
            if name in quantised:
                scale = found.get(name + _SCALE)
                if scale is None:
                    raise self._wrong(f"{name} is stored as {stored.dtype} without {name}{_SCALE}", "use bf16 weights")
                blocks = tuple(-(-extent // size) for extent, size in zip(stored.shape, block, strict=False))
                if len(stored.shape) != 2 or scale.shape != blocks or scale.dtype not in _SCALE_DTYPES:
                    raise self._wrong(
                        f"{scale.name} is {scale.dtype} {list(scale.shape)}; blocks of {list(block)} of "
                        f"{list(stored.shape)} need F32, BF16 or F16 {list(blocks)}"
                    )
                stored = replace(stored, scale=scale, block=block)
            joined[name] = stored
        return joined

    def _block_size(self) -> tuple[int, int]:
        try:
            settings = json.loads((self.folder / "config.json").read_bytes())["quantization_config"]
            stated = settings["weight_block_size"]
        except (OSError, ValueError, KeyError, TypeError):
            stated = None
        if isinstance(stated, list) and len(stated) == 2 and all(type(size) is int and size > 0 for size in stated):
            return stated[0], stated[1]
        raise self._wrong(
            "holds fp8 weights, and its config.json should state their blocks: quantization_config.weight_block_size, "
            f"two positive numbers, not {stated!r}",
            "restore config.json",
        )


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, from its header. Format: the README of huggingface/safetensors.

    Raises:
        OSError: it cannot be read. ValueError: what is wrong with it.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"its header would take {length} bytes of {size}")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its header is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    begin, end = 8 + length, 0
    found = {}
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    try:
        entries.sort(key=lambda item: item[1]["data_offsets"])
        for name, entry in entries:
            dtype, shape, offsets = str(entry["dtype"]), entry["shape"], entry["data_offsets"]
            if len(offsets) != 2 or not all(type(number) is int for number in (*shape, *offsets)):
                raise TypeError(f"{name}: {entry}")
            shape, (start, stop) = tuple(shape), offsets
            if dtype not in ITEM_SIZES:
                raise ValueError(f"{name} has dtype {dtype}, which is not known")
            if min(shape, default=0) < 0 or start != end or stop - start != math.prod(shape) * ITEM_SIZES[dtype]:
                raise ValueError(f"{name}: offsets {start} to {stop} do not fit {dtype} {list(shape)} after byte {end}")
            end = stop
            box = tuple((0, extent) for extent in shape)
            found[name] = StoredTensor(name, shape, dtype, (Extent(str(path), begin + start, box),))
    except (KeyError, TypeError) as error:
        raise ValueError(f"its header is not as it should be ({error!r})") from None
    if begin + end != size:
        raise ValueError(f"its header describes {begin + end} bytes, the file has {size}")
    return found


def read_bin(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file of torch.save.

    Raises:
        OSError: it cannot be read. ValueError: what is wrong with it.
    """
    import mmap

    from swift_dist.converters.torch_files import Archive, tensors_in

    with path.open("rb") as stream:
        # Closed when the last view of it is gone: an error's traceback holds views, and closing it under them raises.
        archive = Archive(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    return {name: archive.stored(name, ref, str(path)) for name, ref in tensors_in(archive.content).items()}


def parse_size(text: str, key: str = "max_shard_size") -> int:
    """Bytes in ``5GB`` (powers of 1000) or ``5GiB`` (of 1024).

    Raises:
        JobError: it is not a positive size.
    """
    found = _SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if size < 1:
        raise JobError(key, f"{text!r} is no size", "write for example 5GB or 512MiB")
    return size


def plan_shards(specs: Iterable[TensorSpec], max_shard_size: int) -> dict[str, list[TensorSpec]]:
    """Which file holds which tensors: filled in order, none above `max_shard_size` bytes unless one tensor alone is."""
    shards: list[list[TensorSpec]] = []
    used = 0
    for spec in specs:
        if not shards or used + spec.num_bytes > max_shard_size:
            shards.append([])
            used = 0
        shards[-1].append(spec)
        used += spec.num_bytes
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def lay_out(shards: Mapping[str, list[TensorSpec]]) -> Layout:
    """Headers of the files and places of the tensors: wider dtypes first, so that every tensor is aligned."""
    files, tensors = [], {}
    for file, specs in shards.items():
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        ordered = sorted(specs, key=lambda spec: -ITEM_SIZES[spec.dtype])
        for spec in ordered:
            offsets = [end, end + spec.num_bytes]
            header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
            end += spec.num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        begin = 8 + len(text)
        for spec in ordered:
            box = tuple((0, extent) for extent in spec.shape)
            place = Extent(file, begin + header[spec.name]["data_offsets"][0], box)
            tensors[spec.name] = StoredTensor(spec.name, spec.shape, spec.dtype, (place,))
        files.append(FileLayout(file, begin + end, ((0, len(text).to_bytes(8, "little") + text),)))
    return Layout(tuple(files), tensors)


def index_text(shards: Mapping[str, list[TensorSpec]]) -> str | None:
    """The text of the index; None: a single file needs none."""
    if len(shards) == 1:
        return None
    weight_map = {spec.name: file for file, specs in shards.items() for spec in specs}
    total = sum(spec.num_bytes for specs in shards.values() for spec in specs)
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
    )
