"""A new torch_dist checkpoint: its files, and its index for megatron-core to load at any layout.

Per-layer keys; all experts of a layer under one key, a chunk for each expert, as ``SequentialMLP.sharded_state_dict``
(megatron/core/transformer/moe/experts.py) has them. Each chunk is an archive of torch.save, one after the other in the
data files, as torch.distributed.checkpoint's FileSystemWriter writes them.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from swift_dist.converters.dist_index import METADATA_NAME
from swift_dist.converters.mapping import Box, Duplicate, Row, box_shape, checkpoint_key, weights
from swift_dist.converters.safetensors_io import FileLayout, Layout, TensorSpec
from swift_dist.converters.stored import TO_TORCH, Extent, StoredTensor

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
    from swift_dist.converters.torch_layout import tensor_layout

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
            begin = archive.places[0][0] if archive.places else 0
            # The archive's own place is kept beside that of the values: the index names it (`_where`).
            extents[key].append(Extent(_file_name(len(files)), end + begin, box))
            end += archive.size
    close_file()
    tensors = {key: StoredTensor(key, spec.shape, spec.dtype, tuple(extents[key])) for key, (spec, _) in specs.items()}
    return Layout(tuple(files), tensors)


def _file_name(number: int) -> str:
    return f"__{number}_0.distcp"


def write_index(folder: Path, layout: Layout) -> list[str]:
    """Write ``.metadata`` and ``metadata.json``. Returns the names of the files."""
    import torch
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo

    from swift_dist.converters.torch_layout import tensor_layout

    described: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    for key, stored in layout.tensors.items():
        chunks = []
        for number, extent in enumerate(stored.extents):
            offsets, sizes = torch.Size(start for start, _ in extent.box), torch.Size(box_shape(extent.box))
            chunks.append(dcp.ChunkStorageMetadata(offsets=offsets, sizes=sizes))
            archive = tensor_layout(box_shape(extent.box), stored.dtype)
            begin = extent.offset - (archive.places[0][0] if archive.places else 0)
            where = dcp.MetadataIndex(key, offsets, number)
            places[where] = _StorageInfo(extent.file, begin, archive.size)
        dtype = getattr(torch, TO_TORCH[stored.dtype])
        properties = dcp.TensorProperties(dtype=dtype)
        described[key] = dcp.TensorStorageMetadata(properties, torch.Size(stored.shape), chunks)
    index = dcp.Metadata(
        state_dict_metadata=described,
        storage_data=places,
        storage_meta=dcp.StorageMeta(),
        version=CURRENT_DCP_VERSION,
    )
    (folder / METADATA_NAME).write_bytes(pickle.dumps(index))
    marker = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    marker |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(marker))
    return [METADATA_NAME, "metadata.json"]


def write_common(folder: Path, content: Mapping[str, Any]) -> str:
    """Write ``common.pt``: what is the same on every rank. Returns its name."""
    import torch

    saved = io.BytesIO()  # torch.save into a file says nothing of why it could not be written
    torch.save({"checkpoint_version": 3.0, "content_metadata": CONTENT_METADATA, **content}, saved)
    (folder / "common.pt").write_bytes(saved.getvalue())
    return "common.pt"


def num_bytes(specs: Mapping[str, tuple[TensorSpec, list[Box]]]) -> int:
    """Bytes of all values."""
    return sum(spec.num_bytes for spec, _ in specs.values())
