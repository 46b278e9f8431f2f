"""What ranks do in the tests of strategy deepspeed. See ranks.py."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import ranks
import torch
import torch.distributed as dist

from swift_dist.config import JobConfig
from swift_dist.engines.hf.strategies.base import Setting

IMPORTS = (*ranks.IMPORTS, "torch._dynamo", "deepspeed", "deepspeed.runtime.zero.stage3")
STEPS = 5
CLIP = 0.05
HALF = ("mlp", "norm")
"""Parts of the names of weights that learn where not all do."""


def job(deepspeed: str, precision: str = "fp32", **train: Any) -> JobConfig:
    return JobConfig.model_validate(
        {
            "task": "sft",
            "model": {"path": "/models/tiny"},
            "strategy": {"deepspeed": deepspeed},
            "train": {"steps": STEPS, "micro_batch_size": 1, "precision": precision, **train},
            "optimizer": {"clip_grad": CLIP},
        }
    )


def groups(module: torch.nn.Module) -> list[dict[str, Any]]:
    """Matrices with weight decay, the rest without and at half the rate."""
    learning = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    found = []
    for matrices in (True, False):
        chosen = [(name, p) for name, p in learning if (p.dim() > 1) == matrices]
        found.append(
            {
                "params": [p for _, p in chosen],
                "names": [name for name, _ in chosen],
                "weight_decay": 0.1 * matrices,
                "lr_scale": 1.0 if matrices else 0.5,
            }
        )
    return [group for group in found if group["params"]]


def adamw(found: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(found, lr=1.0, betas=(0.9, 0.95), eps=1e-6)


def rate(step: int) -> float:
    return 2e-3 / (1 + step)


def model(half: bool = False, **settings: Any) -> torch.nn.Module:
    made = ranks.tiny(**settings)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(not half or any(part in name for part in HALF))
    return made


def strategy(module: torch.nn.Module, wanted: JobConfig) -> Any:
    from swift_dist.engines.hf.strategies.deepspeed import STRATEGY

    return STRATEGY(module, Setting(wanted, torch.device("cpu"), None, adamw, groups))


def gradients(made: Any, step: int, size: int = 2, factor: float = 1.0) -> float:
    """Forward and backward of this rank's micro-batches; the step's loss."""
    found = torch.zeros(())
    batches = ranks.micro_batches(step, dist.get_rank(), dist.get_world_size(), size)
    for number, batch in enumerate(batches):
        with made.accumulate(number == len(batches) - 1):
            loss = ranks.loss_sum(made.module, batch, ranks.total_weight(step))
            made.backward(loss * factor)
        found += loss.detach()
    dist.all_reduce(found)
    return found.item()


def step(made: Any, number: int) -> tuple[float, float]:
    """(loss, gradient norm)."""
    loss = gradients(made, number)
    norm = made.gradient_norm()
    made.update(rate(number), norm)
    return loss, norm


def alone(half: bool = False, steps: int = STEPS) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """The same steps in this process: (loss, gradient norm) of each, and the weights after them."""
    module = model(half)
    optimizer = adamw(groups(module))
    numbers = []
    for number in range(steps):
        loss = ranks.loss_sum(module, ranks.tokens(number), ranks.total_weight(number))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate(number) * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad()
        numbers.append((loss.item(), norm.item()))
    return numbers, {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def train(worker: Any, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cases one after the other in one process; each also drops a step on its way."""
    with ranks.joined(worker):
        return [_train(**case) for case in cases]


def _train(deepspeed: str, half: bool = False, precision: str = "fp32", drop: bool = True) -> dict[str, Any]:
    module = model(half)
    linear, environment = torch.nn.functional.linear, dict(os.environ)
    made = strategy(module, job(deepspeed, precision))
    numbers = []
    for number in range(STEPS):
        if drop and number == 2:
            gradients(made, 77)
            made.gradient_norm()
            made.skip()
            gradients(made, 78, factor=3.0)
            made.skip()  # before anybody has asked for the norm
        numbers.append(step(made, number))
    found = {
        "numbers": numbers,
        "held": made.held_bytes(),
        "optimizer": type(made._engine.optimizer).__name__,
        "weights": dict(made.whole_weights(list(module.state_dict()))),
    }
    made.close()
    made.close()
    found["clean"] = torch.nn.functional.linear is linear and dict(os.environ) == environment
    return found


def save(worker: Any, saves: list[dict[str, Any]], steps: int) -> list[list[tuple[float, float]]]:
    """Train, save, go on; the numbers of all steps."""
    with ranks.joined(worker):
        return [_save(steps=steps, **one) for one in saves]


def _save(steps: int, folder: str, deepspeed: str, precision: str = "fp32", half: bool = False) -> Any:
    made = strategy(model(half), job(deepspeed, precision))
    numbers = [step(made, number) for number in range(steps)]
    write(made, folder)
    numbers += [step(made, number) for number in range(steps, steps + 2)]
    made.close()
    return numbers


def write(made: Any, folder: str) -> None:
    from megatron.core import dist_checkpointing

    if dist.get_rank() == 0:
        Path(folder).mkdir()
    dist.barrier()
    dist_checkpointing.save(made.sharded_state(is_loading=False), folder, validate_access_integrity=True)


def read(made: Any, folder: str) -> None:
    from megatron.core import dist_checkpointing

    made.load_sharded_state(dist_checkpointing.load(made.sharded_state(is_loading=True), folder))


def resume(worker: Any, cases: list[dict[str, Any]], steps: int) -> list[Any]:
    """Load into a model of other weights, and go on: the numbers of two steps, and the weights as they were loaded."""
    with ranks.joined(worker):
        return [_resume(steps=steps, **case) for case in cases]


def _resume(steps: int, folder: str, deepspeed: str, precision: str = "fp32", half: bool = False) -> Any:
    module = model(half)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    made = strategy(module, job(deepspeed, precision))
    read(made, folder)
    loaded = dict(made.whole_weights(list(module.state_dict())))
    numbers = [step(made, number) for number in range(steps, steps + 2)]
    made.close()
    return numbers, loaded
