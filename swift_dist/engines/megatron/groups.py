"""Joining and leaving: the process groups of one attempt, and megatron's global state."""

from __future__ import annotations

import contextlib
import logging
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

    Nothing here talks to a peer: sockets are closed, so that others who wait for this rank are released too.
    """
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
    if not dist.is_initialized():
        return
    with contextlib.suppress(RuntimeError, ValueError):  # a group that a dead peer broke may refuse to be aborted
        dist.distributed_c10d._abort_process_group()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
