"""Names that people know from Megatron, Hugging Face and ms-swift, as top-level aliases of our nested keys."""

from __future__ import annotations

JOB_ALIASES: dict[str, str] = {
    # Hugging Face and ms-swift
    "model": "model.path",
    "tokenizer": "model.tokenizer",
    "dataset": "data.train",
    "val_dataset": "data.validation",
    "max_length": "data.sequence_length",
    "max_steps": "train.steps",
    "learning_rate": "optimizer.lr",
    "lr_scheduler_type": "schedule.name",
    "save_steps": "checkpoint.interval",
    "ckpt_dir": "checkpoint.load",
    "report_to": "report.trackers",
    "nnodes": "cluster.nnodes",
    "nproc_per_node": "cluster.nproc_per_node",
    # Megatron-LM
    "tp": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "vpp": "parallel.virtual_pipeline_model_parallel_size",
    "cp": "parallel.context_parallel_size",
    "ep": "parallel.expert_model_parallel_size",
    "etp": "parallel.expert_tensor_parallel_size",
    "tensor_model_parallel_size": "parallel.tensor_model_parallel_size",
    "pipeline_model_parallel_size": "parallel.pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline_model_parallel_size",
    "context_parallel_size": "parallel.context_parallel_size",
    "expert_model_parallel_size": "parallel.expert_model_parallel_size",
    "expert_tensor_parallel_size": "parallel.expert_tensor_parallel_size",
    "sequence_parallel": "parallel.sequence_parallel",
    "use_distributed_optimizer": "parallel.use_distributed_optimizer",
    "seq_length": "data.sequence_length",
    "train_iters": "train.steps",
    "micro_batch_size": "train.micro_batch_size",
    "global_batch_size": "train.global_batch_size",
    "seed": "train.seed",
    "lr": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "clip_grad": "optimizer.clip_grad",
    "save_interval": "checkpoint.interval",
}
