"""Reading torch_dist checkpoints without running code from them.

torch.distributed.checkpoint keeps its index in ``.metadata``, a pickle; torch's own reader unpickles whatever that file
says, so a checkpoint from elsewhere could run code. ``SafeFileSystemReader`` resolves only the index's own classes.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

_PLANNER = "torch.distributed.checkpoint.planner"
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    # megatron-core keeps every rank's plan beside the index
    _PLANNER: {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}


class UnsafeCheckpointError(pickle.UnpicklingError):
    """The index names something that no index needs: it was damaged or made to run code."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise UnsafeCheckpointError(
            f"the checkpoint's index asks for {module}.{name}, which no index needs; it is not read"
        )


def read_index(path: Path | str) -> Metadata:
    """The index in the file `path` (a checkpoint's ``.metadata``).

    Raises:
        UnsafeCheckpointError: it names a class or function outside torch.distributed.checkpoint's index.
        ValueError: it is damaged.
    """
    content = Path(path).read_bytes()
    try:
        index = _IndexUnpickler(io.BytesIO(content)).load()
    except UnsafeCheckpointError:
        raise
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    if not isinstance(index, Metadata):
        raise ValueError(f"{path} holds a {type(index).__name__}, not a checkpoint's index")
    return index


class SafeFileSystemReader(FileSystemReader):
    """torch's reader with ``read_index`` in place of pickle."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        index = read_index(Path(self.path) / ".metadata")
        if getattr(index, "storage_meta", None) is None:
            index.storage_meta = StorageMeta()
        assert index.storage_meta is not None
        index.storage_meta.load_id = self.load_id
        return index
