"""The job as megatron-core's own configuration objects."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from swift_dist.config import JobConfig
from swift_dist.engines.megatron import requirements
from swift_dist.engines.megatron.requirements import have_transformer_engine
from swift_dist.models import Family
from swift_dist.parallel import ParallelLayout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check(job: JobConfig, device: str) -> None:
    """See `requirements.check`: a rank repeats what the driver has checked, on its own machine."""
    requirements.check(job, on_cuda=device.startswith("cuda"))


def transformer_config(
    job: JobConfig, layout: ParallelLayout, family: Family, hf_config: dict[str, Any], device: str
) -> TransformerConfig:
    """Model geometry of the family, split as the layout says, in the job's precision."""
    dtype = DTYPES[job.train.precision]
    on_cuda = device.startswith("cuda")
    te = on_cuda and have_transformer_engine()
    arguments: dict[str, Any] = {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **family.transformer_config(hf_config),
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
        "sequence_parallel": layout.sequence_parallel,
        "fp16": dtype == torch.float16,
        "bf16": dtype == torch.bfloat16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        # Frees a stage's output as soon as it is being sent. Streams make that safe on a GPU; gloo would send garbage.
        "deallocate_pipeline_outputs": on_cuda,
        # Interleaved stages must send and receive one by one: with two stages a batch has two messages for the same
        # peer, which are matched in the order of the calls, so activations and gradients would change places.
        "overlap_p2p_comm": layout.vpp is not None,
        "batch_p2p_comm": layout.vpp is None,
        "batch_p2p_sync": on_cuda,
        # Weights are filled in by `weights.initialise`, independently of the layout. perform_initialization must
        # stay on all the same: megatron marks there which parameters are split, and the gradient norm reads that.
        "init_method": _leave_as_is,
        "output_layer_init_method": _leave_as_is,
        "embedding_init_method": _leave_as_is,
        **_recompute(job.train.recompute),
        # transformer-engine's rotation knows one position for a place in all samples
        **_fusions(on_cuda, te and not job.data.separate_documents),
    }
    if arguments.get("num_moe_experts"):
        arguments |= {"moe_token_dispatcher_type": "alltoall", "moe_grouped_gemm": on_cuda and te}
    if job.train.fp8 != "none":
        arguments["fp8"] = job.train.fp8
    if te and arguments.get("window_size") is not None:
        # transformer-engine's default, a ring, refuses a sliding window under context parallelism.
        arguments["cp_comm_type"] = "all_gather"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="full scope is deprecated")  # of CUDA graphs, which are off
        config = TransformerConfig(**arguments)
    for name, value in family.rope(hf_config).megatron_attributes().items():
        setattr(config, name, value)
    return config


def _leave_as_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _recompute(how: str) -> dict[str, Any]:
    if how == "full":  # every layer keeps its input only
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if how == "selective":  # attention scores are computed again
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def _fusions(on_cuda: bool, te: bool) -> dict[str, Any]:
    """Fused kernels: all of them are compiled for, or written for, a GPU."""
    return {"bias_dropout_fusion": on_cuda, "apply_rope_fusion": on_cuda and te}


def ddp_config(job: JobConfig) -> DistributedDataParallelConfig:
    """Gradients are added up in fp32, whatever the weights' precision."""
    parallel = job.parallel
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=_overlap_param_gather(job),
        check_for_nan_in_grad=False,  # runs.guard decides, from the loss and the gradient norm
    )


def _overlap_param_gather(job: JobConfig) -> bool:
    """Only the distributed optimizer gathers parameters, and megatron overlaps that only if gradients overlap too."""
    parallel = job.parallel
    return parallel.use_distributed_optimizer and parallel.overlap_grad_reduce and parallel.overlap_param_gather


def optimizer_config(job: JobConfig) -> OptimizerConfig:
    """Masters and moments in fp32; rate and decay are set at every step (see engine.train_step)."""
    optimizer = job.optimizer
    return OptimizerConfig(
        optimizer="sgd" if optimizer.name == "sgd" else "adam",  # Muon also has AdamW, for what is no matrix
        lr=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_eps=optimizer.eps,
        sgd_momentum=optimizer.momentum,
        muon_momentum=optimizer.momentum,
        clip_grad=optimizer.clip_grad,
        fp16=job.train.precision == "fp16",
        bf16=job.train.precision == "bf16",
        params_dtype=DTYPES[job.train.precision],
        initial_loss_scale=job.train.initial_loss_scale,
        use_distributed_optimizer=job.parallel.use_distributed_optimizer,
        overlap_param_gather=_overlap_param_gather(job),
    )
