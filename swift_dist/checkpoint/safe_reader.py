"""The index of torch_dist checkpoints, read for torch's own loader: no pickle runs freely.

`SafeFileSystemReader` reads ``.metadata`` with an unpickler that knows the index's own classes and nothing else.
Conversions need neither torch nor this: see swift_dist/converters/dist_index.py.
"""

from __future__ import annotations

import os
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

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
