"""Hugging Face weight folders: reading slices of safetensors, and writing sharded safetensors as a stream.

Reading maps the files into memory and copies only the slices asked for. Writing lays out every file from names, shapes
and dtypes alone, so that tensors can then be put in place one at a time, in any order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from swift_dist.converters.mapping import Box, slices
from swift_dist.errors import JobError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's place and kind. ``dtype`` is safetensors' name (F32, BF16, F16, F8_E4M3, ...)."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class SafetensorsFolder:
    """The tensors of a folder: one ``*.safetensors`` file, or several with an index.

    Attributes:
        tensors: what there is, by name; read from the files' headers.

    Raises:
        JobError: no weights, a file that the index names is missing, or one that is not whole.
    """

    def __init__(self, folder: str | os.PathLike[str], key: str = "model.path") -> None:
        self.folder = Path(folder)
        self._key = key
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            for file in self._files():
                self._read_header(file)
        except BaseException:
            self.close()
            raise

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """A tensor, or the part that `box` names, on the CPU in the stored dtype.

        Raises:
            JobError: it is stored in a format that is not a plain float (quantised weights).
        """
        info = self.tensors[name]
        if info.dtype not in _DTYPES:
            raise JobError(
                self._key,
                f"{name} in {self.folder / info.file} is stored as {info.dtype}; readable: {', '.join(_DTYPES)}",
                "use the unquantised weights of the model",
            )
        stored = self._open[info.file].get_slice(name)
        return stored[slices(box)] if box else stored[...]

    def close(self) -> None:
        self._open.clear()
        self._stack.close()

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _files(self) -> list[str]:
        index = self.folder / INDEX_NAME
        if not index.is_file():
            found = sorted(path.name for path in self.folder.glob("*.safetensors"))
            if found == [SINGLE_NAME] or len(found) == 1:
                return found
            problem = f"{len(found)} *.safetensors files and no {INDEX_NAME}" if found else "no *.safetensors files"
            raise JobError(self._key, f"{self.folder} holds {problem}", "give a whole Hugging Face model folder")
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise JobError(self._key, f"{index} cannot be read: {error}", "restore the file") from None
        for file in files:
            if Path(file).name != file:
                raise JobError(self._key, f"{index} names {file}, outside the folder", "restore the file")
            if not (self.folder / file).is_file():
                raise JobError(self._key, f"{index} names {file}, which is missing", "download the model completely")
        return files

    def _read_header(self, file: str) -> None:
        try:
            opened = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
            self._open[file] = opened
            for name in opened.keys():  # noqa: SIM118 - not a dict
                if name in self.tensors:
                    raise JobError(
                        self._key, f"{name} is in {self.tensors[name].file} and in {file}", "keep one of them"
                    )
                stored = opened.get_slice(name)
                self.tensors[name] = TensorInfo(file, tuple(stored.get_shape()), stored.get_dtype())
        except (SafetensorError, OSError) as error:
            raise JobError(
                self._key, f"{self.folder / file} is not a whole safetensors file: {error}", "download it again"
            ) from None


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is going to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        size = self.dtype.itemsize
        for extent in self.shape:
            size *= extent
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


class ShardedWriter:
    """Writes planned tensors into a folder; `close` checks that each was written once, and writes the index.

    One tensor at a time is in memory. The folder must exist; making it appear at once is the caller's business.
    """

    def __init__(self, folder: Path, shards: Mapping[str, list[TensorSpec]]) -> None:
        self._folder, self._shards = folder, shards
        self._places: dict[str, tuple[str, int, TensorSpec]] = {}
        self._files: dict[str, BinaryIO] = {}
        self._stack = ExitStack()
        for file, specs in shards.items():
            self._begin(file, specs)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor in its place. Its shape and dtype must be the planned ones."""
        file, offset, spec = self._places.pop(name)
        assert tuple(tensor.shape) == spec.shape and tensor.dtype == spec.dtype, f"{name} is not as planned"
        stream = self._files[file]
        stream.seek(offset)
        stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Finish the files and force them to the disk."""
        assert not self._places, f"never written: {sorted(self._places)[:5]}"
        for stream in self._files.values():
            stream.flush()
            os.fsync(stream.fileno())
        self._stack.close()
        if len(self._shards) > 1:
            weight_map = {spec.name: file for file, specs in self._shards.items() for spec in specs}
            total = sum(spec.num_bytes for specs in self._shards.values() for spec in specs)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def abort(self) -> None:
        self._stack.close()

    def _begin(self, file: str, specs: list[TensorSpec]) -> None:
        """Write the header: its length (u64, little endian), then JSON, padded with spaces to a multiple of 8.

        Wider dtypes come first, so that every tensor is aligned. Format: the README of huggingface/safetensors.
        """
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):
            end = offset + spec.num_bytes
            header[spec.name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        stream = self._stack.enter_context((self._folder / file).open("wb"))
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)
        self._files[file] = stream
        for spec in specs:
            start = header[spec.name]["data_offsets"][0]
            self._places[spec.name] = (file, 8 + len(text) + start, spec)
