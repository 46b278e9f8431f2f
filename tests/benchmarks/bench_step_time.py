"""Step time of the engine against a bare megatron-core loop: the same model, layout and data, in the same run.

    python tests/benchmarks/bench_step_time.py [--quick]

Two ranks hold both models and take steps in turn, so that whatever else the machine does falls on both alike. The bare
loop is written out below from megatron-core's own functions; it shares the description of the layers (what a model is)
and the CPU shim (without which nothing runs here) with the engine, and no other code. Prints the median of the ratios
of paired steps; fails above 1.03.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

LIMIT = 1.03
SEQUENCE, MICRO_BATCH, GLOBAL_BATCH = 256, 2, 8
MODEL = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": SEQUENCE,
}
JOB = {
    "model": {"config": MODEL},
    "data": {"sequence_length": SEQUENCE},
    "train": {
        "steps": 1000,
        "micro_batch_size": MICRO_BATCH,
        "global_batch_size": GLOBAL_BATCH,
        "precision": "fp32",
    },
    "schedule": {"name": "cosine", "warmup_steps": 10},
    "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}


def micro_batches(step: int) -> list[dict[str, Any]]:
    import torch

    generator = torch.Generator().manual_seed(step)
    text = torch.randint(0, MODEL["vocab_size"], (GLOBAL_BATCH, SEQUENCE + 1), generator=generator)
    positions = torch.arange(SEQUENCE).expand(MICRO_BATCH, SEQUENCE).contiguous()
    return [
        {
            "tokens": part[:, :-1].contiguous(),
            "labels": part[:, 1:].contiguous(),
            "loss_mask": torch.ones(MICRO_BATCH, SEQUENCE),
            "position_ids": positions,
        }
        for part in text.split(MICRO_BATCH)
    ]


def bare_loop() -> Callable[[int], float]:
    """A pretraining step as megatron-core's own example has it: per-token loss, clipping, its scheduler."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.transformer_config import TransformerConfig

    from swift_dist.engines.megatron.spec import block_spec

    config = TransformerConfig(
        num_layers=MODEL["num_hidden_layers"],
        hidden_size=MODEL["hidden_size"],
        ffn_hidden_size=MODEL["intermediate_size"],
        num_attention_heads=MODEL["num_attention_heads"],
        num_query_groups=MODEL["num_key_value_heads"],
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        calculate_per_token_loss=True,
        pipeline_dtype=torch.float32,
    )
    model = GPTModel(
        config,
        block_spec(config),
        vocab_size=MODEL["vocab_size"],
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
    )
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=True,
        use_distributed_optimizer=True,
        overlap_param_gather=True,
    )
    chunk = DistributedDataParallel(config, ddp_config, model)
    config.no_sync_func = chunk.no_sync
    config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=3e-4,
            min_lr=3e-5,
            weight_decay=0.1,
            adam_beta2=0.95,
            clip_grad=1.0,
            use_distributed_optimizer=True,
            overlap_param_gather=True,
        ),
        [chunk],
        use_gloo_process_groups=False,
    )
    scheduler = OptimizerParamScheduler(optimizer, 0.0, 3e-4, 3e-5, 10, 1000, "cosine", 0.1, 0.1, 1000, "constant")

    def loss(mask: Any, losses: Any) -> Any:
        total, count = torch.sum(losses * mask), mask.sum().to(torch.int)
        report = torch.stack((total.detach(), count))
        torch.distributed.all_reduce(report, group=parallel_state.get_data_parallel_group())
        return total, count, report

    def forward(batches: Any, wrapped: Any) -> Any:
        batch = next(batches)
        losses = wrapped(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return losses, partial(loss, batch["loss_mask"])

    def step(number: int) -> float:
        batches = micro_batches(number)
        began = time.perf_counter()
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(batches),
            model=[chunk],
            num_microbatches=len(batches),
            seq_length=SEQUENCE,
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
        )
        optimizer.step()
        scheduler.step(1)
        total, count = torch.stack(reports).sum(0).tolist()
        assert total / count > 0
        return time.perf_counter() - began

    return step


def measure(worker: Any, pairs: int) -> list[tuple[float, float]]:
    """(engine's, bare loop's) seconds for each pair of steps."""
    import torch.distributed as dist

    from swift_dist.config import JobConfig
    from swift_dist.engines import build_engine

    engine = build_engine(JobConfig.model_validate(JOB), MODEL, worker)

    def ours(number: int) -> float:
        batches = micro_batches(number)
        began = time.perf_counter()
        engine.train_step(batches, number)
        return time.perf_counter() - began

    bare = bare_loop()
    found = []
    for number in range(-3, pairs):  # some to warm up
        order = (ours, bare) if number % 2 else (bare, ours)
        seconds = {}
        for function in order:
            dist.barrier()
            seconds[function] = function(abs(number))
        if number >= 0:
            found.append((seconds[ours], seconds[bare]))
    return found


def main() -> int:
    from gang import Gang

    pairs = 12 if "--quick" in sys.argv else 100
    gang = Gang()
    try:
        found = gang.run(__file__, "measure", 2, seconds=1800, pairs=pairs)[0]
    finally:
        gang.close()
    ratio = statistics.median(ours / bare for ours, bare in found)
    engine, bare = (statistics.median(column) for column in zip(*found, strict=True))
    print(
        json.dumps(
            {
                "ratio": round(ratio, 4),
                "limit": LIMIT,
                "engine_seconds": round(engine, 4),
                "bare_seconds": round(bare, 4),
                "pairs": len(found),
            }
        )
    )
    return 0 if ratio <= LIMIT or "--quick" in sys.argv else 1


if __name__ == "__main__":
    sys.exit(main())
