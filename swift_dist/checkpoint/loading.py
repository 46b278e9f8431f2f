"""Reading a checkpoint back, at the layout it was written with or at any other.

``megatron.core.dist_checkpointing.load`` does the work, with three changes: nothing in the checkpoint is unpickled
beyond tensors, plain values and the index's own classes; each rank reads what it needs without talking to the others;
and a mismatch between checkpoint and job is found before anything is read, and raised on every rank alike.

megatron-core is imported inside the functions: on a machine without CUDA the engine must prepare that import.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from swift_dist.checkpoint.folder import Checkpoint
from swift_dist.checkpoint.groups import gloo_group
from swift_dist.checkpoint.safe_reader import SafeFileSystemReader
from swift_dist.checkpoint.trusted import safe_types
from swift_dist.errors import JobError, RunError

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

logger = logging.getLogger(__name__)

FP8_SCALES = "_extra_state"
"""How transformer-engine's modules name their FP8 scaling factors. A run without FP8 saves none: a load that asks for
them begins with new ones."""
_SHOWN = 5  # names in one message


def load(checkpoint: Checkpoint, sharded_state_dict: dict[str, Any], *, strict: bool = True) -> dict[str, Any]:
    """Fill `sharded_state_dict` from `checkpoint`. Collective: all ranks, same checkpoint, main thread.

    Args:
        checkpoint: from ``newest_whole`` or ``open_checkpoint``.
        sharded_state_dict: megatron-core's, of this rank, at this job's layout (``is_loading=True``).
        strict: also refuse tensors in the checkpoint that no rank asks for (False: to load the weights alone).

    Returns:
        the state dict with tensors in place of ``ShardedTensor``, and the common state; hand it to the engine.

    Raises:
        JobError: on every rank, where names or shapes in the checkpoint do not fit the job: another model.
        RunError: on every rank, where the ranks were given different checkpoints, or a file cannot be read.
    """
    from megatron.core import dist_checkpointing

    from swift_dist.checkpoint.strategies import CommonStrategy, ShardedStrategy

    begun = time.monotonic()
    group, owned = gloo_group()
    try:
        index, failure = None, None
        try:
            index = SafeFileSystemReader(checkpoint.path).read_metadata()
        except Exception as error:  # damaged or dangerous: every rank must hear of it
            failure = f"{checkpoint.path / '.metadata'} cannot be read: {error}"
        _raise_everywhere(failure, group)
        assert index is not None
        sharded_state_dict = _without_absent_scales(sharded_state_dict, index)
        _require_fit(checkpoint, index, sharded_state_dict, strict, group)
        state: dict[str, Any] = {}
        try:
            with torch.serialization.safe_globals(safe_types()):
                state = dist_checkpointing.load(
                    sharded_state_dict,
                    str(checkpoint.path),
                    sharded_strategy=ShardedStrategy(index),
                    common_strategy=CommonStrategy(),
                    validate_access_integrity=False,
                )
        except Exception as error:
            logger.debug("load of %s failed", checkpoint.path, exc_info=True)
            failure = f"{type(error).__name__}: {error}"
        _raise_everywhere(failure and f"checkpoint {checkpoint.path} cannot be loaded: {failure}", group)
    finally:
        if owned:
            dist.destroy_process_group(group)
    logger.info("loaded %s in %.1f s", checkpoint.path, time.monotonic() - begun)
    return state


def _without_absent_scales(sharded_state_dict: dict[str, Any], index: Metadata) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    def is_absent(value: Any) -> bool:
        is_scale = isinstance(value, ShardedObject) and FP8_SCALES in value.key
        return is_scale and value.unique_key not in index.state_dict_metadata

    _, present = extract_matching_values(sharded_state_dict, is_absent)
    return present


def _require_fit(
    checkpoint: Checkpoint, index: Metadata, sharded_state_dict: dict[str, Any], strict: bool, group: dist.ProcessGroup
) -> None:
    """Compare names and shapes of what the ranks ask for with what the checkpoint holds. Collective."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
    from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
    from megatron.core.dist_checkpointing.utils import extract_sharded_base

    sharded, _, _ = load_preprocess(sharded_state_dict)
    sharded, _ = extract_sharded_base(sharded)
    asked = [value for value in nested_values(sharded) if isinstance(value, (ShardedTensor, ShardedObject))]
    own = (str(checkpoint.path), checkpoint.step, {value.key for value in asked}, _misfits(index, asked))
    rank = dist.get_rank(group)
    gathered: list[Any] | None = [None] * dist.get_world_size(group) if rank == 0 else None
    dist.gather_object(own, gathered, dst=0, group=group)
    verdict: list[Any] = [None, None]
    if gathered is not None:
        if len({answer[:2] for answer in gathered}) > 1:
            steps = sorted({answer[1] for answer in gathered})
            verdict[0] = (
                f"the ranks see different newest checkpoints (steps {steps}): is the folder shared by all nodes?"
            )
        keys = set().union(*(answer[2] for answer in gathered))
        misfits = {text for answer in gathered for text in answer[3]}
        held = {key for key, value in index.state_dict_metadata.items() if isinstance(value, TensorStorageMetadata)}
        if strict:
            misfits |= {f"{key}: in the checkpoint, not in the job's model" for key in held - keys}
        if misfits:
            shown = sorted(misfits)[:_SHOWN]
            more = f"\n  and {len(misfits) - _SHOWN} more" if len(misfits) > _SHOWN else ""
            verdict[1] = "\n  ".join(["names or shapes do not fit the job:", *shown]) + more
    dist.broadcast_object_list(verdict, src=0, group=group)
    if verdict[0]:
        raise RunError(verdict[0])
    if verdict[1]:
        raise JobError(
            "checkpoint",
            f"{checkpoint.path}: {verdict[1]}",
            "use the model and optimizer that the checkpoint was written with, or another output folder",
        )


def _misfits(index: Metadata, asked: list[ShardedTensor | ShardedObject]) -> set[str]:
    """One line for each tensor or object that the checkpoint does not hold as it is asked for."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    lines = set()
    for value in asked:
        key = value.unique_key if isinstance(value, ShardedObject) else value.key
        held = index.state_dict_metadata.get(key)
        if held is None:
            lines.add(f"{key}: in the job's model, not in the checkpoint")
        elif isinstance(held, BytesStorageMetadata) != isinstance(value, ShardedObject):
            lines.add(f"{key}: a tensor on one side, an object on the other")
        elif isinstance(value, ShardedTensor) and not value.allow_shape_mismatch:
            shape, expected = tuple(held.size), tuple(value.global_shape)  # type: ignore[union-attr]
            if shape != expected:
                lines.add(f"{key}: shape {list(shape)} in the checkpoint, {list(expected)} in the job")
    return lines


def _raise_everywhere(failure: str | None, group: dist.ProcessGroup) -> None:
    """Raise RunError on every rank if any rank has a failure. Collective."""
    failed = torch.tensor([failure is not None], dtype=torch.int64)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=group)
    if not failed.item():
        return
    failures: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(failures, failure, group=group)
    rank, first = next((rank, text) for rank, text in enumerate(failures) if text is not None)
    raise RunError(f"rank {rank}: {first}", "remove that checkpoint folder: the run goes on from the one before it")
