"""A new torch_dist checkpoint: its files, and its index for megatron-core to load at any layout.

Per-layer keys; all experts of a layer under one key, a chunk for each expert, as ``SequentialMLP.sharded_state_dict``
(megatron/core/transformer/moe/experts.py) has them. Each chunk is an archive of torch.save, one after the other in the
data files, as torch.distributed.checkpoint's FileSystemWriter writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from swift_dist.converters.dist_index import METADATA_NAME
from swift_dist.converters.mapping import Box, Duplicate, Row, box_shape, checkpoint_key, weights
from swift_dist.converters.safetensors_io import FileLayout, Layout, TensorSpec
from swift_dist.converters.stored import TO_TORCH, Extent, StoredTensor
from swift_dist.converters.torch_writing import Named, archive_layout, built, called, named, pickled, tensor_layout

_DCP = "torch.distributed.checkpoint"
_VERSION = "1.0.0"  # CURRENT_DCP_VERSION
CONTENT_METADATA = {"non_homogeneous_layers": True}
"""What megatron-core calls the style of keys; it looks for it in common.pt."""


def dist_specs(rows: Iterable[Row | Duplicate], dtypes: Mapping[str, str]) -> dict[str, tuple[TensorSpec, list[Box]]]:
    """Every tensor of the checkpoint with its chunks, by key.

    Args:
        dtypes: of each Megatron tensor, by global name.
    """
    found: dict[str, tuple[TensorSpec, list[Box]]] = {}
    for tensor in weights(rows):
        key, expert = checkpoint_key(tensor.name)
        whole = tuple((0, extent) for extent in tensor.shape)
        if expert is None:
            found[key] = (TensorSpec(key, tensor.shape, dtypes[tensor.name]), [whole])
            continue
        chunks = found[key][1] if key in found else []
        chunks.append(((expert, expert + 1), *whole))
        found[key] = (TensorSpec(key, (len(chunks), *tensor.shape), dtypes[tensor.name]), chunks)
    return found


def lay_out_dist(specs: Mapping[str, tuple[TensorSpec, list[Box]]], max_shard_size: int) -> Layout:
    """Places of all chunks in data files of at most `max_shard_size` bytes, unless one chunk alone is larger."""
    files: list[FileLayout] = []
    literals: list[tuple[int, bytes]] = []
    extents: dict[str, list[Extent]] = {key: [] for key in specs}
    end = 0

    def close_file() -> None:
        nonlocal end
        if end:
            files.append(FileLayout(_file_name(len(files)), end, tuple(literals)))
            literals.clear()
            end = 0

    for key, (spec, chunks) in specs.items():
        for box in chunks:
            archive = tensor_layout(box_shape(box), spec.dtype)
            if end and end + archive.size > max_shard_size:
                close_file()
            literals += [(end + offset, content) for offset, content in archive.literals]
            extents[key].append(Extent(_file_name(len(files)), end + archive.places[0][0], box))
            end += archive.size
    close_file()
    tensors = {key: StoredTensor(key, spec.shape, spec.dtype, tuple(extents[key])) for key, (spec, _) in specs.items()}
    return Layout(tuple(files), tensors)


def _file_name(number: int) -> str:
    return f"__{number}_0.distcp"


def write_index(folder: Path, layout: Layout) -> list[str]:
    """Write ``.metadata`` and ``metadata.json``. Returns the names of the files.

    The index is a pickle of torch's ``Metadata`` (torch/distributed/checkpoint/metadata.py and filesystem.py).
    """
    described: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    for key, stored in layout.tensors.items():
        chunks = []
        for number, extent in enumerate(stored.extents):
            offsets = _size(start for start, _ in extent.box)
            chunks.append(built(f"{_DCP}.metadata.ChunkStorageMetadata", _chunk(offsets, box_shape(extent.box))))
            archive = tensor_layout(box_shape(extent.box), stored.dtype)
            where = {"fqn": key, "index": number, "offset": offsets}
            # The extent is the place of the values; the index names that of the archive around them.
            info = {
                "relative_path": extent.file,
                "offset": extent.offset - archive.places[0][0],
                "length": archive.size,
            }
            places[built(f"{_DCP}.metadata.MetadataIndex", where)] = built(f"{_DCP}.filesystem._StorageInfo", info)
        state = {"properties": _properties(stored.dtype), "size": _size(stored.shape), "chunks": chunks}
        described[key] = built(f"{_DCP}.metadata.TensorStorageMetadata", state)
    identity: dict[str, Any] = {"checkpoint_id": None, "save_id": None, "load_id": None, "modules": []}
    index = {
        "state_dict_metadata": described,
        "planner_data": None,
        "storage_data": places,
        "storage_meta": built(f"{_DCP}.metadata.StorageMeta", identity),
        "version": _VERSION,
    }
    (folder / METADATA_NAME).write_bytes(pickled(built(f"{_DCP}.metadata.Metadata", index)))
    marker = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    marker |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(marker))
    return [METADATA_NAME, "metadata.json"]


def _size(extents: Iterable[int]) -> Named:
    return called("torch.Size", tuple(extents))


def _chunk(offsets: Named, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"offsets": offsets, "sizes": _size(shape)}


def _properties(dtype: str) -> Named:
    """(dtype, layout, requires_grad, memory format, pin_memory), as ``TensorProperties.__getstate__`` gives them."""
    layout = called("torch.serialization._get_layout", "torch.strided")
    contiguous = called(f"{_DCP}.metadata._MEM_FORMAT_ENCODING", 0)
    state = (named(f"torch.{TO_TORCH[dtype]}"), layout, False, contiguous, False)
    return built(f"{_DCP}.metadata.TensorProperties", state)


def write_common(folder: Path, content: Mapping[str, Any]) -> str:
    """Write ``common.pt``: what is the same on every rank, plain values only. Returns its name."""
    archive = archive_layout({"checkpoint_version": 3.0, "content_metadata": CONTENT_METADATA, **content})
    assert len(archive.literals) == 1, "it holds no tensors"
    (folder / "common.pt").write_bytes(archive.literals[0][1])
    return "common.pt"
