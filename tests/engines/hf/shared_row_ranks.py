"""Ranks of the sequence-parallel tests: a model's loss and gradients on shared rows beside those of one process."""

from __future__ import annotations

from typing import Any

import ranks
import torch
import torch.distributed as dist

from swift_dist.engines.hf import attention as whole
from swift_dist.sequence_parallel import attention
from swift_dist.sequence_parallel.degrees import Degrees
from swift_dist.sequence_parallel.group import SharedRow, gather_tokens, make_groups
from swift_dist.sequence_parallel.row import Row, without_empty_ranks


def _row(lengths: list[int]) -> tuple[torch.Tensor, ...]:
    """(tokens, positions, labels, weights) [T]; uneven weights, some 0."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(3, ranks.VOCABULARY, (sum(lengths),), generator=generator)
    weights = torch.rand(sum(lengths), generator=generator) * (torch.rand(sum(lengths), generator=generator) < 0.7)
    weights[0], labels = 1.0, tokens.roll(-1)
    return tokens, torch.cat([torch.arange(length) for length in lengths]), labels, weights


def _logps(model: Any, tokens: Any, positions: Any, labels: Any, **arguments: Any) -> torch.Tensor:
    logits = model(input_ids=tokens[None], position_ids=positions[None], use_cache=False, **arguments).logits[0]
    return torch.log_softmax(logits.double() if logits.dtype == torch.float64 else logits.float(), -1).gather(
        1, labels[:, None]
    )[:, 0]


def compare(
    worker: Any, lengths: list[int], ulysses: int, ring: int, family: str, settings: dict[str, Any], dtype: str
) -> dict[str, float]:
    """Largest relative differences of the log-probabilities and of any weight's gradient; the gradient's size."""
    torch.set_num_threads(1)
    degrees = Degrees(ulysses, ring)
    with ranks.joined(worker):
        model = ranks.tiny(family, **settings).to(getattr(torch, dtype))
        tokens, positions, labels, weights = _row(lengths)
        whole.register()
        model.set_attn_implementation(whole.NAME)
        expected = _logps(model, tokens, positions, labels, **whole.boundaries(lengths, torch.device("cpu")))
        (expected * weights).sum().backward()
        right = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()

        sharing = make_groups(degrees, worker.rank, worker.world_size)
        attention.register(whole.attend_whole_rows)
        model.set_attn_implementation(attention.NAME)
        filling = without_empty_ranks(tuple(lengths), degrees)
        filled = (*lengths, filling) if filling else tuple(lengths)
        row = Row(filled, degrees)
        held = [torch.nn.functional.pad(tensor, (0, filling)) for tensor in (tokens, positions, labels, weights)]
        if filling:
            held[1][-filling:] = torch.arange(filling)
        mine = row.of(sharing.rank)
        local = [tensor[mine] for tensor in held]
        logps = _logps(model, *local[:3], shared_row=SharedRow(sharing, row))
        gathered = gather_tokens(logps, list(row.sizes), row.order, sharing.group)
        (gathered * held[3]).sum().backward()
        largest, worst = max(gradient.abs().max() for gradient in right.values()), 0.0
        for name, parameter in model.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(gradient, group=sharing.group)
            worst = max(worst, float((gradient - right[name]).abs().max() / largest))
        count = sum(lengths)
        return {
            "logps": float((gathered[:count] - expected).detach().abs().max() / expected.detach().abs().max()),
            "gradients": worst,
            "size": float(largest),
        }
