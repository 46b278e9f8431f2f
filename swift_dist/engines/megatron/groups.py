"""Joining and leaving: the process groups of one attempt, and megatron's global state."""

from __future__ import annotations

from swift_dist.engines.groups import join_world, leave_world, wait_longer
from swift_dist.parallel import ParallelLayout
from swift_dist.runs.worker import Worker


def join(layout: ParallelLayout, worker: Worker, rendezvous_timeout: float) -> None:
    """Meet the other ranks at the worker's store and build megatron's groups (gloo on CPU, NCCL on CUDA)."""
    from megatron.core import parallel_state

    join_world(worker, rendezvous_timeout)
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
    wait_longer()


def leave() -> None:
    """Leave all groups and reset megatron's globals, so that this process can join again. Safe after a peer's death."""
    _reset_megatron()
    leave_world()


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
