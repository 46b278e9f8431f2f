"""Reading torch_dist checkpoints (torch.distributed.checkpoint, as megatron-core writes it) as named arrays.

No process group, no model object, and no pickle run freely: `SafeFileSystemReader` reads the index (``.metadata``) with
an unpickler that knows the index's own classes and nothing else. swift_dist/checkpoint loads through it too.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from swift_dist.converters.mapping import Box, box_shape

METADATA_NAME = ".metadata"

_DCP, _MCORE = "torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.strategies.torch"
_ALLOWED = {
    f"{_DCP}metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    f"{_DCP}filesystem": {"_StorageInfo", "_StoragePrefix"},
    f"{_DCP}planner": {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    _MCORE: {"MCoreMetadata", "MCoreSavePlan"},  # empty classes, in files of older megatron-core versions
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
}


class _IndexUnpickler(pickle.Unpickler):
    """Builds the classes that a DCP index consists of; any other name in the file is an error."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index names {module}.{name}, which does not belong in one: not loaded")


class SafeFileSystemReader(FileSystemReader):
    """torch's FileSystemReader, except that the index is read without running code; it is read once and kept.

    `read_metadata` raises ``pickle.UnpicklingError`` (or EOFError and the like, if it is truncated) and OSError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._index is None:
            with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as stream:
                index = _IndexUnpickler(stream).load()
            if not isinstance(index, Metadata):
                raise pickle.UnpicklingError(f"the index holds a {type(index).__name__}, not torch's Metadata")
            index.storage_meta = getattr(index, "storage_meta", None) or StorageMeta()
            index.storage_meta.load_id = self.load_id
            self._index = index
        return self._index


@dataclass(frozen=True)
class TensorInfo:
    """What the index says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class _Into(LoadPlanner):
    """Hands the reader one destination tensor; nothing else of DCP's planning is needed to fill it."""

    def __init__(self, destination: torch.Tensor) -> None:
        self._destination = destination

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None: ...

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise TypeError(f"{read_item.dest_index.fqn} is an object, not a tensor")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        found = self._destination
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            found = found.narrow(axis, start, length)
        return found

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None: ...


class DistCheckpoint:
    """The tensors of one torch_dist folder.

    Attributes:
        tensors: what there is, by key; read from the index alone.

    Raises:
        OSError, pickle.UnpicklingError, EOFError: the index is missing or not readable.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._reader = SafeFileSystemReader(self.folder)
        self._index = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._index, is_coordinator=True)
        self.tensors = {
            key: TensorInfo(tuple(stored.size), stored.properties.dtype)
            for key, stored in self._index.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def read(self, key: str, box: Box | None = None) -> torch.Tensor:
        """A whole tensor, or the part that `box` names; on the CPU, in the stored dtype.

        Raises:
            KeyError: there is no such tensor.
            OSError: a data file is missing or short.
            ValueError: the stored chunks do not cover the box.
        """
        info = self.tensors[key]
        stored = self._index.state_dict_metadata[key]
        assert isinstance(stored, TensorStorageMetadata)
        box = box if box is not None else tuple((0, extent) for extent in info.shape)
        destination = torch.empty(box_shape(box), dtype=info.dtype)
        wanted = ChunkStorageMetadata(offsets=torch.Size(start for start, _ in box), sizes=torch.Size(box_shape(box)))
        items = create_read_items_for_chunk_list(key, stored, [wanted])
        if sum(item.lengths.numel() for item in items) != destination.numel():
            raise ValueError(f"{key}: the checkpoint's chunks do not make up the tensor")
        self._reader.read_data(LoadPlan(items), _Into(destination)).wait()
        return destination

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor in turn; one at a time is in memory."""
        for key in self.tensors:
            yield key, self.read(key)


def read_tensor(folder: str | os.PathLike[str], key: str) -> torch.Tensor:
    """One tensor of a torch_dist folder; see `DistCheckpoint.read`."""
    return DistCheckpoint(folder).read(key)
