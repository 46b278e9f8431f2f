"""Ranks of the sequence-parallel tests: a model's loss and gradients on shared rows beside those of one process."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import ranks
import torch
import torch.distributed as dist

from swift_dist.engines.hf import attention as whole
from swift_dist.engines.hf.batches import Forward, prepare
from swift_dist.sequence_parallel import attention, ring
from swift_dist.sequence_parallel.degrees import Degrees
from swift_dist.sequence_parallel.group import make_groups
from swift_dist.sequence_parallel.rotary import show_longest


def micro_batch(lengths: list[int], filling: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """A row of sequences with `filling` tokens behind them, as the data room lays it out; uneven weights, some 0."""
    generator = torch.Generator().manual_seed(11)
    counts = [*lengths, filling]
    tokens = torch.randint(3, vocabulary, (sum(counts),), generator=generator)
    weights = torch.rand(len(tokens), generator=generator) * (torch.rand(len(tokens), generator=generator) < 0.7)
    weights[0], labels = 1.0, tokens.roll(-1)
    segments = torch.cat([torch.full((count,), number) for number, count in enumerate(counts)])
    last = segments != segments.roll(-1)
    last[-1] = True  # nothing follows it in its sequence
    uncounted = last | (segments == len(lengths))
    row = {
        "tokens": tokens,
        "position_ids": torch.cat([torch.arange(count) for count in counts]),
        "labels": labels.masked_fill(uncounted, -100),
        "weights": weights.masked_fill(uncounted, 0.0),
        "segments": segments.masked_fill(segments == len(lengths), -1),
    }
    others = {"lengths": torch.tensor(lengths), "sample_weights": torch.ones(len(lengths))}
    return {**{name: tensor[None] for name, tensor in row.items()}, **others}


def alone(model: Any, row: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities of the tokens that count, each sequence by itself through transformers' own attention."""
    found, start = [], 0
    for length in row["lengths"].tolist():
        these = slice(start, start + length)
        logps = model(input_ids=row["tokens"][:, these], use_cache=False).logits[0].log_softmax(-1)
        counted = row["weights"][0, these] != 0
        found.append(logps[counted].gather(1, row["labels"][0, these][counted][:, None])[:, 0])
        start += length
    return torch.cat(found)


def _loss(logps: torch.Tensor, row: dict[str, torch.Tensor]) -> torch.Tensor:
    weights = row["weights"][row["weights"] != 0].to(logps)
    return -(logps * weights).sum() / weights.sum().clamp(min=1e-12)


def compare(
    worker: Any,
    rows: list[dict[str, Any]],
    degrees: list[list[int]],
    family: str,
    settings: dict[str, Any],
    dtype: str,
    least: int = ring._LEAST,
) -> list[list[dict[str, float]]]:
    """Of each row ({"lengths", "filling"}), for each (ulysses, ring): largest relative differences of the loss, of
    log-probabilities and of any weight's gradient from one process; the gradient's size. `least`: see ring.py."""
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    with ranks.joined(worker), patch.object(ring, "_LEAST", least):
        plain, shared = (ranks.tiny(family, **settings).to(getattr(torch, dtype)) for _ in range(2))
        plain.set_attn_implementation("sdpa")  # the eager softmax is float32
        attention.register(whole.attend_whole_rows)
        shared.set_attn_implementation(attention.NAME)
        show_longest(shared)
        forward = Forward(shared, "tokens")
        groups = [make_groups(Degrees(*each), worker.rank, worker.world_size) for each in degrees]
        found = []
        for row in (micro_batch(**row, vocabulary=ranks.VOCABULARY) for row in rows):
            plain.zero_grad()
            expected = alone(plain, row)
            right = _loss(expected, row)
            right.backward()
            cells = []
            for sharing in groups:
                shared.zero_grad()
                logps = forward(shared, prepare(row, cpu, "tokens", sharing)).logps
                assert logps is not None
                loss = _loss(logps, row)
                loss.backward()
                cells.append(
                    {
                        "loss": _difference(loss, right),
                        "logps": _difference(logps, expected),
                        **_of_gradients(shared, plain, sharing.group),
                    }
                )
            found.append(cells)
        return found


def _difference(got: torch.Tensor, right: torch.Tensor) -> float:
    return float(((got - right).abs().max() / right.abs().max().clamp(min=1e-12)).detach())


def _of_gradients(shared: Any, plain: Any, group: dist.ProcessGroup) -> dict[str, float]:
    right = {name: parameter.grad for name, parameter in plain.named_parameters()}
    largest, worst = max(gradient.abs().max() for gradient in right.values()), 0.0
    for name, parameter in shared.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient on this rank"
        dist.all_reduce(parameter.grad, group=group)
        worst = max(worst, float((parameter.grad - right[name]).abs().max() / largest))
    return {"gradients": worst, "size": float(largest)}
