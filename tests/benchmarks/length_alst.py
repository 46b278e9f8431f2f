"""A rank of DeepSpeed's ALST, for `bench_alst.py`: torchrun ... length_alst.py CASE.json.

As its tutorial says (deepspeed.ai, "Ulysses/ALST"): `UlyssesSPAttentionHF` in the place of SDPA, the samples through
`UlyssesSPDataLoaderAdapter`, the losses of the ranks' parts gathered and weighted by how many tokens count in each.
With `tiled`, ALST's `TiledFusedLogitsLoss` and its `TiledMLP` (which makes the tiles that its docstring names).
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.nn.functional

LOGITS_OF_A_TILE = 1 << 22
"""As many as our own tiles have (`kernels/linear_cross_entropy.py`)."""


def tile_mlp() -> None:
    """As in TiledMLP's docstring."""
    import torch.distributed as dist
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP
    from transformers.models.llama import modeling_llama

    def of_tile(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        tiles = torch.tensor(math.ceil(x.shape[1] / x.shape[2]))
        dist.all_reduce(tiles, op=dist.ReduceOp.MAX)  # ranks must agree, or ZeRO-3 waits for ever
        weights = [self.down_proj.weight, self.gate_proj.weight, self.up_proj.weight]
        return TiledMLP.apply(of_tile, self, x, int(tiles), weights)

    modeling_llama.LlamaMLP.forward = forward


def tile_loss(model: Any) -> None:
    """Let the model's forward return the sum of the losses of its tokens, times a factor, instead of logits."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    def forward(input_ids: Any, position_ids: Any, shift_labels: Any, factor: float) -> torch.Tensor:
        def of_tile(self: Any, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            logits = self.lm_head(hidden).float()
            losses = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            return losses * factor

        hidden = model.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        tiles = math.ceil(hidden.shape[1] * model.config.vocab_size / LOGITS_OF_A_TILE)
        return TiledFusedLogitsLoss.apply(
            of_tile, model, hidden, shift_labels, None, tiles, [model.lm_head.weight], "sum"
        )

    model.forward = forward


def loss_of(engine: Any, batch: dict[str, torch.Tensor], group: Any, tiled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What to call backward on, and the mean over all tokens that count."""
    labels = batch["shift_labels"]
    counted = (labels != -100).sum()
    if tiled:
        # TiledFusedLogitsLoss computes the gradient of the output layer's weight within its forward pass and does not
        # multiply it by what comes in backwards: the tutorial's weighting of the ranks' losses must be in it already,
        # times the ranks, by which DeepSpeed divides.
        ranks = torch.distributed.get_world_size(group)
        torch.distributed.all_reduce(counted, group=group)
        named = {name: batch[name] for name in ("input_ids", "position_ids", "shift_labels")}
        part = engine(**named, factor=ranks / float(counted))
        mean = part.detach() / ranks
        torch.distributed.all_reduce(mean, group=group)
        return part, mean
    logits = engine(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    mean = engine.module.loss_function(
        logits=logits, labels=None, shift_labels=labels, vocab_size=engine.module.config.vocab_size
    )
    parts = torch.distributed.nn.functional.all_gather(mean * counted, group=group)
    counts = torch.distributed.nn.functional.all_gather(counted, group=group)
    loss = torch.stack(parts).sum() / torch.stack(counts).sum()
    return loss, loss.detach()


def samples_of(case: dict[str, Any], rank: int, ranks: int) -> list[dict[str, torch.Tensor]]:
    """This rank's, in whose order the adapter takes them: sample i is step i."""
    samples = case["samples"]
    samples = samples[: len(samples) // ranks * ranks]
    return [
        {
            "input_ids": torch.tensor(sample["input_ids"]),
            "labels": torch.tensor(sample["labels"]),
            "position_ids": torch.arange(len(sample["input_ids"])),
        }
        for sample in samples[rank::ranks]
    ]


def main(path: str) -> None:
    warnings.simplefilter("ignore")
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import torch._dynamo
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF, UlyssesSPDataLoaderAdapter
    from deepspeed.utils import groups, safe_get_full_grad
    from length_ours import resident_gib
    from transformers import AutoModelForCausalLM

    from swift_dist.engines.hf.strategies._deepspeed_start import no_builds
    from swift_dist.runs.throughput import memory_gib

    case: dict[str, Any] = json.loads(Path(path).read_text())
    torch.set_num_threads(1)
    with no_builds():
        deepspeed.init_distributed(dist_backend="gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        case["model"], core_attn_implementation="sdpa", sequence_parallel_size=ranks, micro_batch_size=1
    )
    if case["tiled"]:
        tile_mlp()
    model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32, attn_implementation="sdpa")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if case["tiled"]:
        tile_loss(model)
    with no_builds():
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), **case["adamw"]),
            mpu=mpu,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": case["clip"],
                "zero_optimization": case["zero"],
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
            },
        )
    engine.train()
    group = groups._get_sequence_parallel_group()
    loader = torch.utils.data.DataLoader(samples_of(case, rank, ranks), batch_size=1)
    batches = iter(UlyssesSPDataLoaderAdapter(loader, rank, group, ranks, torch.device("cpu")))
    found: dict[str, list[float]] = {"seconds": [], "cpu_seconds": [], "losses": []}
    held, norm = resident_gib(), 0.0
    for step in range(case["steps"]):
        torch.distributed.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        loss, mean = loss_of(engine, next(batches), group, case["tiled"])
        engine.backward(loss)
        if step == 0:  # not timed
            norm = math.sqrt(sum(float(safe_get_full_grad(p).double().square().sum()) for p in model.parameters()))
        engine.step()
        found["losses"].append(float(mean))
        found["seconds"].append(time.perf_counter() - wall)
        found["cpu_seconds"].append(time.process_time() - cpu)
    if rank == 0:
        Path(case["result"]).write_text(json.dumps({**found, "norm": norm, "memory_gib": memory_gib("cpu") - held}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
