"""Who writes which shard: megatron-core's and torch's planning.

A save is planned from the rank's ``sharded_state_dict``: megatron-core applies its factories and picks the main
replicas, torch's planner turns them into write items, rank 0 checks that all ranks' items cover every tensor exactly
once and builds the checkpoint's index. All collectives go through the gloo group that is handed in.

megatron-core is imported inside the functions: on a machine without CUDA the engine must prepare that import.
"""

from __future__ import annotations

import dataclasses
import io
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from swift_dist.checkpoint.trusted import safe_types

CONTENT_METADATA_KEY = "content_metadata"  # where megatron-core's own save() puts it in the common state


@dataclass(frozen=True)
class LocalShards:
    """What this rank contributes to one checkpoint.

    Attributes:
        plan: torch's write items, one per shard or object, in writing order.
        tensors: the live tensor of each tensor item (not yet copied).
        objects: the serialised bytes of each object item.
        common: the serialised part of the state that is the same on every rank (rank 0 writes it).
        shards: the sharding of every tensor and object, replicas included, without data: for the integrity check.
    """

    plan: SavePlan
    tensors: dict[WriteItemKey, torch.Tensor]
    objects: dict[WriteItemKey, io.BytesIO]
    common: bytes
    shards: list[Any]


WriteItemKey = tuple[str, tuple[int, ...]]
"""(tensor or object name, offset in the global tensor): unique among the items of all ranks."""


def item_key(item: WriteItem) -> WriteItemKey:
    return item.index.fqn, tuple(item.index.offset or ())


def plan_locally(sharded_state_dict: dict[str, Any], content_metadata: dict[str, Any] | None, rank: int) -> LocalShards:
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
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    planner.set_up_planner(mcore_to_pyt_state_dict(by_key, is_loading=False), is_coordinator=rank == 0)
    plan = dataclasses.replace(planner.create_local_plan(), storage_data=_StoragePrefix(f"__{rank}_"))
    tensors, objects = {}, {}
    for item in plan.items:
        data = planner.resolve_data(item)
        if item.type == WriteItemType.BYTE_IO:
            objects[item_key(item)] = data
        else:
            tensors[item_key(item)] = data
    return LocalShards(plan=plan, tensors=tensors, objects=objects, common=_serialised(common), shards=shards)


def plan_globally(local: LocalShards, group: dist.ProcessGroup) -> Metadata | None:
    """Check all ranks' shards against each other and build the checkpoint's index. Collective over `group`.

    Returns:
        the index on rank 0, None elsewhere.

    Raises:
        ValueError: on every rank, where the shards of the ranks overlap or leave a hole.
    """
    from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner
    from megatron.core.dist_checkpointing.validation import validate_sharding_integrity

    rank = dist.get_rank(group)
    gathered: list[Any] | None = [None] * dist.get_world_size(group) if rank == 0 else None
    dist.gather_object((local.plan, local.shards), gathered, dst=0, group=group)
    metadata, failure = None, cast(list[str | None], [None])
    if gathered is not None:
        try:
            validate_sharding_integrity([shards for _, shards in gathered])
            planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
            _, metadata = planner.create_global_plan([plan for plan, _ in gathered])
        except Exception as error:  # carried to every rank below
            failure = [f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(failure, src=0, group=group)
    if failure[0] is not None:
        raise ValueError(f"the ranks' shards do not make up the tensors: {failure[0]}")
    return metadata


def same_structure(plan: SavePlan, earlier: SavePlan | None) -> bool:
    """Whether `plan` writes the same items (names, offsets, shapes, dtypes) as `earlier`."""
    return earlier is not None and plan.items == earlier.items


def check_readable(local: LocalShards) -> None:
    """Raise ValueError where the state holds something that a load, which runs no code, could not read back."""
    with torch.serialization.safe_globals(safe_types()):
        for name, content in [
            ("common state", local.common),
            *((k[0], v.getvalue()) for k, v in local.objects.items()),
        ]:
            try:
                torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            except Exception as error:
                raise ValueError(f"{name} holds more than tensors and plain values: {error}") from None


def _serialised(common: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    torch.save(common, stream)
    return stream.getvalue()
