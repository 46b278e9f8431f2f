"""What ranks of the hf engine's tests share: the group that they meet in, tiny models, micro-batches of them.

A test calls ``gang.run(FILE, "function", world, **arguments)``: ``function(worker, **arguments)`` of FILE runs on each
rank, arguments being JSON. FILE imports this module by its name.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

IMPORTS = ("transformers.models.llama.modeling_llama", "transformers.models.qwen2.modeling_qwen2", "peft")
"""Imported once, before ranks are forked."""

VOCABULARY = 95  # neither 2 nor 4 ranks divide it


@contextlib.contextmanager
def joined(worker: Any) -> Iterator[None]:
    """Meet the other ranks in a gloo group, and leave it."""
    from swift_dist.engines.groups import leave_world

    dist.init_process_group(
        "gloo", store=worker.store(), rank=worker.rank, world_size=worker.world_size, timeout=timedelta(seconds=60)
    )
    try:
        yield
    finally:
        leave_world()
        gc.collect()  # as the engine does: what still holds the group's sockets open goes, too


def tiny(family: str = "llama", *, seed: int = 7, **settings: Any) -> Any:
    """A random model of `family` ("llama" or "qwen2") in float32, the same wherever it is made."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **{**values, **settings}), dtype=torch.float32
        )


def tokens(step: int, samples: int = 8, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, loss weights) of a global batch: int64 and float32 [samples, length]. The weights are uneven, so that a
    mean of means is another number than the mean."""
    generator = torch.Generator().manual_seed(1000 + step)
    drawn = torch.randint(3, VOCABULARY, (samples, length), generator=generator)
    weights = (torch.rand((samples, length), generator=generator) < 0.6).float()
    weights[:, 0] = 0.0
    weights[:, -1] = 1.0
    return drawn, weights


def micro_batches(step: int, rank: int, world: int, size: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's share of the global batch of a step, `size` samples at a time."""
    drawn, weights = tokens(step)
    return list(zip(drawn[rank::world].split(size), weights[rank::world].split(size), strict=True))


def loss_sum(module: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor], total: float) -> torch.Tensor:
    """This micro-batch's part of the loss: the sum of weighted cross entropies over the whole batch's weights."""
    drawn, weights = batch
    logits = module(input_ids=drawn, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), drawn[:, 1:].flatten(), reduction="none")
    return (losses * weights[:, 1:].flatten()).sum() / total


def total_weight(step: int) -> float:
    """What the loss of a step is divided by."""
    return tokens(step)[1][:, 1:].sum().item()
