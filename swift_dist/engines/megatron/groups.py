"""Joining and leaving: the process groups of one attempt, and megatron's global state."""

from __future__ import annotations

import contextlib
import gc
import logging
import types
from datetime import timedelta

import torch
import torch.distributed as dist

from swift_dist.parallel import ParallelLayout
from swift_dist.runs.worker import Worker

log = logging.getLogger(__name__)

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits in a collective. Dead peers are noticed at once (gloo) or by the watchdog; this is the net."""


def join(layout: ParallelLayout, worker: Worker, rendezvous_timeout: float) -> None:
    """Meet the other ranks at the worker's store and build megatron's groups (gloo on CPU, NCCL on CUDA)."""
    from megatron.core import parallel_state

    on_cuda = worker.device.startswith("cuda")
    if on_cuda:
        torch.cuda.set_device(torch.device(worker.device))
    meeting = timedelta(seconds=rendezvous_timeout)
    dist.init_process_group(
        backend="nccl" if on_cuda else "gloo",
        store=worker.store(),
        rank=worker.rank,
        world_size=worker.world_size,
        timeout=meeting,
        device_id=torch.device(worker.device) if on_cuda else None,
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
        distributed_timeout_minutes=max(round(rendezvous_timeout / 60), 1),
        create_gloo_process_groups=False,
    )
    for group in list(dist.distributed_c10d._world.pg_map):
        # From here on a rank may legitimately be late (loading weights, writing a checkpoint).
        dist.distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT, group)


def leave() -> None:
    """Leave all groups and reset megatron's globals, so that this process can join again. Safe after a peer's death.

    Nothing here talks to a peer. Ranks that wait for this one are released when its sockets close, and gloo closes them
    only with the last reference to a group (its `abort` does nothing), so references are taken away wherever they are.
    """
    _reset_megatron()
    if not dist.is_initialized():
        return
    if dist.get_backend() == "nccl":
        with contextlib.suppress(RuntimeError, ValueError):  # a group that a dead peer broke may refuse
            dist.distributed_c10d._abort_process_group()
    names = dict(dist.distributed_c10d._world.pg_names)
    groups = sorted(names, key=names.__getitem__, reverse=True)
    names.clear()
    dist.destroy_process_group()
    _take_away(groups)
    while groups:
        # A group with an operation in flight waits here until a peer closes its end. All ranks close in the same order,
        # so no two wait for each other.
        groups.pop()


def _reset_megatron() -> None:
    """Forget the groups, the random streams and what else megatron keeps between calls."""
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    from swift_dist.engines.megatron.attention import forget_masks

    RotaryEmbedding.forward.cache_clear()  # keyed by the module: keeps models alive
    forget_masks()
    moe_utils.get_moe_layer_wise_logging_tracker().clear()
    moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = None
    random._CUDA_RNG_STATE_TRACKER = None
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    parallel_state.destroy_model_parallel()


def _take_away(groups: list[dist.ProcessGroup]) -> None:
    """Replace every reference to the groups by None, except `groups` itself. (Megatron's modules, hooks, handles and
    globals hold hundreds, in cycles; `destroy_model_parallel` forgets some of its own.)"""
    wanted = {id(group) for group in groups}
    for holder in gc.get_referrers(*groups):
        if holder is groups or isinstance(holder, types.FrameType):
            continue
        if isinstance(holder, types.CellType):
            holder.cell_contents = None
        elif isinstance(holder, list):
            holder[:] = [None if id(value) in wanted else value for value in holder]
        else:
            table = holder if isinstance(holder, dict) else getattr(holder, "__dict__", {})
            for name in [name for name, value in table.items() if id(value) in wanted]:
                table[name] = None
