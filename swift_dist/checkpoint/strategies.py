"""How megatron-core's load reads a checkpoint's parts here: without running code from it, without collectives."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.metadata import Metadata

from swift_dist.checkpoint.safe_reader import SafeFileSystemReader


class CommonStrategy(TorchCommonLoadStrategy):
    """Reads common.pt without running code."""

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        return torch.load(Path(checkpoint_dir) / "common.pt", map_location="cpu", weights_only=True)


class _LoadPlanner(MCoreLoadPlanner):
    """Reads sharded objects without running code (torch's own planner unpickles anything)."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn  # our state is flat: the name is the key
        self.original_state_dict[name] = torch.load(value, map_location="cpu", weights_only=True)


class ShardedStrategy(TorchDistLoadShardedStrategy):
    """megatron-core's strategy with the index already read, the planner above, and no collectives."""

    def __init__(self, index: Metadata) -> None:
        super().__init__()
        self._index = index

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> dict[str, Any]:
        tensors = [value for value in nested_values(sharded_state_dict) if isinstance(value, ShardedTensor)]
        by_key, flat_mapping, rename_mapping = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        state = mcore_to_pyt_state_dict(by_key, is_loading=True)
        planner = _LoadPlanner(
            flatten_state_dict=False,
            shapes_validation_sharded_tensors=[tensor for tensor in tensors if not tensor.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={t.key: t for t in tensors if t.allow_shape_mismatch},
        )
        reader = SafeFileSystemReader(checkpoint_dir)
        planner.set_up_planner(state, self._index, is_coordinator=False)
        reader.set_up_storage_reader(self._index, is_coordinator=False)
        reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()
        loaded = {key: _unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
        loaded = _replace_sharded_keys_with_state_dict_keys(loaded, flat_mapping, rename_mapping)
        _restore_dict_types(loaded, sharded_state_dict)
        return loaded
