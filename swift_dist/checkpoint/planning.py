"""Who writes which shard: megatron-core's and torch's planning, with the writing shared out over a shard's holders.

A save is planned from the rank's ``sharded_state_dict``: megatron-core applies its factories, torch turns shards into
write items. Rank 0 checks that all ranks' shards cover every tensor exactly once, has each shard written by one of the
ranks that hold it (data-parallel replicas hold the same ones: each writes a part), and builds the checkpoint's index.
All that is kept while the structure stays the same. Collectives go through the gloo group that is handed in.

megatron-core is imported inside the functions: on a machine without CUDA the engine must prepare that import.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from swift_dist.checkpoint.trusted import safe_types

CONTENT_METADATA_KEY = "content_metadata"  # where megatron-core's own save() puts it in the common state

WriteItemKey = tuple[str, tuple[int, ...]]
"""(tensor or object name, offset in the global tensor): a shard, whichever rank holds it."""


def item_key(item: WriteItem) -> WriteItemKey:
    return item.index.fqn, tuple(item.index.offset or ())


@dataclass(frozen=True)
class LocalShards:
    """What this rank holds of one checkpoint.

    Attributes:
        items: torch's write item of every shard that this rank could write, and of every object that it must.
        tensors: the live tensor of each tensor item (not yet copied).
        objects: the serialised bytes of each object item.
        common: the serialised part of the state that is the same on every rank (rank 0 writes it).
        shards: the sharding of every tensor and object, replicas included, without data: the structure.
    """

    items: dict[WriteItemKey, WriteItem]
    tensors: dict[WriteItemKey, torch.Tensor]
    objects: dict[WriteItemKey, io.BytesIO]
    common: bytes
    shards: list[Any]


@dataclass(frozen=True)
class Plan:
    """What this rank writes, and on rank 0 the index of the whole checkpoint; good for one structure.

    Attributes:
        shards: the structure that it was made for.
        items: what this rank writes, in writing order.
        index: the checkpoint's index (None except on rank 0).
    """

    shards: list[Any]
    items: list[WriteItem]
    index: Metadata | None

    def fits(self, local: LocalShards) -> bool:
        """Whether `local` has the structure (names, offsets, shapes, dtypes, replicas) that the plan was made for."""
        return self.shards == local.shards

    def tensor_keys(self) -> list[WriteItemKey]:
        return [item_key(item) for item in self.items if item.type != WriteItemType.BYTE_IO]

    def for_torch(self, rank: int) -> SavePlan:
        return SavePlan(items=self.items, storage_data=_StoragePrefix(f"__{rank}_"))


def collect_shards(sharded_state_dict: dict[str, Any], content_metadata: dict[str, Any] | None) -> LocalShards:
    """Turn a rank's ``sharded_state_dict`` (megatron-core's; consumed) into write items. No collectives."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies.torch import (
        MCoreSavePlanner,
        _replace_state_dict_keys_with_sharded_keys,
        mcore_to_pyt_state_dict,
    )
    from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8

    state = dict(sharded_state_dict)
    if content_metadata is not None:
        state[CONTENT_METADATA_KEY] = dict(content_metadata)
    force_all_tensors_to_non_fp8(state)
    sharded, common = save_preprocess(state, validate_access_integrity=False)
    shards = [value.without_data() for value in nested_values(sharded)]
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded)
    writable = {key: kept for key, values in by_key.items() if (kept := _writable(values))}
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    planner.set_up_planner(mcore_to_pyt_state_dict(writable, is_loading=False), is_coordinator=False)
    items = {item_key(item): item for item in planner.create_local_plan().items}
    data: dict[WriteItemKey, Any] = {key: planner.resolve_data(item) for key, item in items.items()}
    objects = {key: data.pop(key) for key, item in items.items() if item.type == WriteItemType.BYTE_IO}
    stream = io.BytesIO()
    torch.save(common, stream)
    return LocalShards(items=items, tensors=data, objects=objects, common=stream.getvalue(), shards=shards)


def _writable(values: list[Any]) -> list[Any]:
    """Of one name's shards on this rank: each place once (tied weights may be held twice), objects if they are main.

    Copies on a regular grid may be written by any holder. Those of optimizer state that is sharded over data-parallel
    ranks may be cut elsewhere: only the main one counts.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica

    if isinstance(values[0], ShardedObject):
        return [value for value in values if is_main_replica(value.replica_id)]
    by_place: dict[tuple[int, ...], Any] = {}
    for value in values:
        if not value.has_regular_grid and not is_main_replica(value.replica_id):
            continue
        place = tuple(value.global_offset)
        if place not in by_place or is_main_replica(value.replica_id):
            by_place[place] = value
    return list(by_place.values())


def make_plan(local: LocalShards, group: dist.ProcessGroup) -> Plan:
    """Check all ranks' shards against each other, share out the writing, build the index. Collective over `group`.

    Raises:
        ValueError: on every rank, where the shards of the ranks overlap or leave a hole, or where one rank's state
            holds something that could not be read back.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    own = (local.items, local.shards, _unreadable(local))
    gathered: list[Any] | None = [None] * world_size if rank == 0 else None
    dist.gather_object(own, gathered, dst=0, group=group)
    index: Metadata | None = None
    answers: list[Any] | None = None
    if gathered is not None:
        try:
            shares, index = _plan_all(gathered)
            answers = [(share, None) for share in shares]
        except Exception as error:  # carried to every rank below
            answers = [((), str(error))] * world_size
    received: list[Any] = [None]
    dist.scatter_object_list(received, answers, src=0, group=group)
    keys, failure = received[0]
    if failure is not None:
        raise ValueError(failure)
    return Plan(shards=local.shards, items=[local.items[key] for key in keys], index=index)


def _plan_all(
    gathered: list[tuple[dict[WriteItemKey, WriteItem], list[Any], str | None]],
) -> tuple[list[Any], Metadata]:
    """(keys that each rank writes, index) from what each rank holds."""
    from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner
    from megatron.core.dist_checkpointing.validation import validate_sharding_integrity

    for rank, (_, _, unreadable) in enumerate(gathered):
        if unreadable is not None:
            raise ValueError(f"rank {rank}: {unreadable}")
    try:
        validate_sharding_integrity(cast(Any, [shards for _, shards, _ in gathered]))
        shares = share_out([items for items, _, _ in gathered])
        plans = [
            SavePlan(items=[items[key] for key in share]) for (items, _, _), share in zip(gathered, shares, strict=True)
        ]
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        _, index = planner.create_global_plan(plans)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"the ranks' shards do not make up the tensors: {reason}") from error
    return shares, index


def share_out(held: list[Mapping[WriteItemKey, WriteItem]]) -> list[list[WriteItemKey]]:
    """The keys that each rank writes: every key once, by a rank that holds it, with bytes about even.

    Shards with few holders are given out first, then large ones; each goes to the holder with the least so far.
    """
    holders: dict[WriteItemKey, list[int]] = {}
    sizes: dict[WriteItemKey, int] = {}
    for rank, items in enumerate(held):
        for key, item in items.items():
            holders.setdefault(key, []).append(rank)
            sizes[key] = _num_bytes(item)
    loads = [0] * len(held)
    shares: list[list[WriteItemKey]] = [[] for _ in held]
    for key in sorted(holders, key=lambda key: (len(holders[key]), -sizes[key], key)):
        rank = min(holders[key], key=lambda rank: (loads[rank], rank))
        loads[rank] += sizes[key]
        shares[rank].append(key)
    return shares


def _num_bytes(item: WriteItem) -> int:
    data = item.tensor_data
    return 0 if data is None else data.chunk.sizes.numel() * data.properties.dtype.itemsize


def _unreadable(local: LocalShards) -> str | None:
    """What a load, which runs no code, could not read back; None if there is nothing."""
    contents: Iterable[tuple[str, bytes]] = [
        ("the common state", local.common),
        *((name, stream.getvalue()) for (name, _), stream in local.objects.items()),
    ]
    with torch.serialization.safe_globals(safe_types()):
        for name, content in contents:
            try:
                torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            except Exception as error:
                return f"{name} holds more than tensors and plain values: {error}"
    return None
