"""The distributed optimizer's state as boxes of the model's tensors: no rank sends or asks for more than its own.

Megatron's distributed optimizer cuts the flat run of a bucket's parameters into equal ranges, one for each
data-parallel rank, so a rank owns a range of a parameter's row-major numbers. Megatron's own reshardable format first
gathers whole parameters: 12 bytes for each parameter of the stage on every rank, at save and again at load. But a range
is a few boxes of the tensor (rest of a row, whole rows, begin of a row), and a box is what a checkpoint stores. The
keys and global shapes are those of megatron's ``fully_reshardable`` format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from swift_dist.checkpoint.boxes import boxes


def shards(
    optimizers: list[DistributedOptimizer], model_state: dict[str, Any], is_loading: bool = False
) -> dict[str, ShardedTensor]:
    """Fp32 masters and moments of this rank: views of the optimizer's state.

    Args:
        optimizers: dense and expert ones; their state exists (see ``optimizer.set_update_count``).
        model_state: the chunks' sharded state dicts, whose tensors are the parameters themselves.
        is_loading: the shards will be read into. A master that is the weight itself (fp32 training) then gets memory of
            its own: a checkpoint's rounded bf16 weight is read into the same place, before it or after it.
    """
    places = {
        id(base.data): base
        for base in nested_values(model_state)
        if isinstance(base, (ShardedTensor, ShardedTensorFactory))
    }
    found: dict[str, ShardedTensor] = {}
    for optimizer in optimizers:
        for parameter, start, stop in _ranges(optimizer):
            tensors = optimizer._get_main_param_and_optimizer_states(parameter)
            if is_loading and parameter.dtype == torch.float32:
                tensors["param"] = torch.empty_like(tensors["param"])
            for part in _parts(places[id(parameter)]):
                for name, tensor in tensors.items():
                    if name != "step":
                        for box in _boxes_of(part, parameter, name, tensor, start, stop):
                            found[f"{box.key}{list(box.global_offset)}"] = box
    return found


def _ranges(optimizer: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """(parameter, start, stop) of the flat range that this rank owns of each parameter that it has a part of."""
    for by_dtype in optimizer.gbuf_ranges:
        for buckets in by_dtype.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _parts(base: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """The tensors of the checkpoint that a parameter is stored as: itself, or both halves of a gated MLP."""
    return list(nested_values([base.build()])) if isinstance(base, ShardedTensorFactory) else [base]


def _boxes_of(
    part: ShardedTensor, parameter: torch.nn.Parameter, name: str, tensor: torch.Tensor, start: int, stop: int
) -> Iterator[ShardedTensor]:
    """Where the range [start, stop) of `parameter`, whose state `name` is `tensor`, meets `part` of it."""
    assert part.data is not None and part.data.is_contiguous(), f"{part.key} is no run of its parameter's numbers"
    assert part.data.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr(), f"{part.key} is a copy"
    begin = part.data.storage_offset() - parameter.storage_offset()
    low, high = max(start, begin), min(stop, begin + part.data.numel())
    at = low - start
    # The last entry counts data-parallel copies of the parameter; of its optimizer state there is one.
    replica = (*part.replica_id[:-1], 0)  # type: ignore[misc]
    for offset, size in boxes(tuple(part.local_shape), low - begin, high - begin):
        extra = part.prepend_axis_num
        count = math.prod(size)
        before, corner = part.global_offset[:extra], part.global_offset[extra:]
        shape = (*[1] * extra, *size)
        yield ShardedTensor(
            key=f"optimizer.state.{name}.{part.key}",
            data=tensor.detach()[at : at + count].view(shape),
            dtype=tensor.dtype,
            local_shape=shape,
            global_shape=part.global_shape,
            global_offset=(*before, *(a + b for a, b in zip(corner, offset, strict=True))),
            axis_fragmentations=None,  # no regular grid
            replica_id=replica,
            allow_shape_mismatch=part.allow_shape_mismatch,
        )
        at += count
