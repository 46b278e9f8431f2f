"""Who writes what: every shard once, by a rank that holds it, evenly."""

from __future__ import annotations

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from swift_dist.checkpoint.planning import item_key, share_out


def item(name, size):
    shape = torch.Size([size])
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(offsets=torch.Size([0]), sizes=shape),
        properties=TensorProperties(dtype=torch.float32),
        size=shape,
    )
    return WriteItem(index=MetadataIndex(name, [0]), type=WriteItemType.SHARD, tensor_data=data)


def held(names):
    return {item_key(i): i for i in (item(name, size) for name, size in names.items())}


def test_replicas_share_the_work():
    sizes = {f"w{n}": 10 for n in range(8)} | {"large": 40}
    shares = share_out([held(sizes)] * 4)
    written = [name for share in shares for name, _ in share]
    assert sorted(written) == sorted(sizes)
    assert [sum(sizes[name] for name, _ in share) for share in shares] == [40, 30, 30, 20]


def test_only_holders_write():
    everywhere = {"shared": 5}
    shares = share_out([held({"a": 100, **everywhere}), held({"b": 1, **everywhere}), held(everywhere)])
    assert [[name for name, _ in share] for share in shares] == [["a"], ["b"], ["shared"]]
