"""What ranks do in the tests of strategies ddp and fsdp2. See ranks.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ranks
import torch

from swift_dist.config import JobConfig
from swift_dist.engines.hf.strategies.base import Setting
from swift_dist.optim import make_optimizer, parameter_groups
from swift_dist.plugins import find

LR, CLIP = 0.01, 0.3  # the tiny models' first norms are above 1: clipping is at work
LORA_RANK = 3  # of 4 ranks, one has no row of such a matrix


def job(**settings: Any) -> JobConfig:
    """A job of `strategy`, `train` and `optimizer` settings."""
    given = {"strategy": {}, "train": {}, "optimizer": {}} | settings
    return JobConfig.model_validate(
        {
            "task": "sft",
            "strategy": given["strategy"],
            "train": {"precision": "fp32", **given["train"]},
            "optimizer": {"lr": LR, "clip_grad": CLIP, "eps": 1e-4, **given["optimizer"]},
        }
    )


def model(case: dict[str, Any]) -> Any:
    """The model of a case: `family`, `config`, and `learns` ("all", "some" or "lora")."""
    made = ranks.tiny(case.get("family", "llama"), **case.get("config", {}))
    learns = case.get("learns", "all")
    if learns == "some":
        for name, parameter in made.named_parameters():
            parameter.requires_grad_("mlp" in name or "norm" in name)
    elif learns == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(11)
        made = get_peft_model(made, LoraConfig(r=LORA_RANK, target_modules="all-linear"))
        with torch.no_grad():  # B is 0 at first, and so is A's gradient
            for name, parameter in made.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
    if case.get("recompute"):
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return made


def lr_scale(name: str) -> float:
    return 2.0 if "down_proj" in name else 1.0


def strategy(made: JobConfig, module: torch.nn.Module) -> Any:
    device = torch.device("cpu")
    setting = Setting(
        job=made,
        device=device,
        group=None,
        make_optimizer=lambda groups: make_optimizer(groups, made.optimizer, device),
        parameter_groups=lambda m: parameter_groups(m, made.optimizer, lr_scale),
    )
    return find("swift_dist.engines.hf.strategies", made.strategy.name, "STRATEGY")(module, setting)


def accumulate(held: Any, step: int, worker: Any, factor: float = 1.0) -> float:
    """Forward and backward of this rank's share; its part of the loss."""
    share = ranks.micro_batches(step, worker.rank, worker.world_size)
    loss = 0.0
    for number, batch in enumerate(share):
        with held.accumulate(number == len(share) - 1):
            part = factor * ranks.loss_sum(held.module, batch, ranks.total_weight(step))
            held.backward(part)
        loss += part.item()
    return loss


def step(held: Any, number: int, worker: Any) -> tuple[float, float]:
    """(loss over all ranks, norm)."""
    loss = torch.tensor(accumulate(held, number, worker), dtype=torch.float64)
    torch.distributed.all_reduce(loss)
    norm = held.gradient_norm()
    held.update(LR / (number + 1), norm)
    return loss.item(), norm


def train(worker: Any, cases: list[dict[str, Any]], steps: int) -> list[Any]:
    """For each case: losses and norms, whole weights (rank 0) and held bytes."""
    found = []
    with ranks.joined(worker):
        for case in cases:
            held = strategy(job(**case["job"]), model(case))
            numbers = [step(held, number, worker) for number in range(steps)]
            names = [name for name, _ in model(case).named_parameters()]
            found.append((numbers, dict(held.whole_weights(names)), held.held_bytes()))
            held.close()
    return found


def alone(case: dict[str, Any], steps: int) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """The same by plain torch in this process: the reference."""
    made = model({**case, "recompute": False})
    settings = job(**case["job"]).optimizer
    named = {name: p for name, p in made.named_parameters() if p.requires_grad}
    groups = [
        {
            "params": [p],
            "weight_decay": settings.weight_decay if p.dim() > 1 else 0.0,
            "lr_scale": lr_scale(name),
        }
        for name, p in named.items()
    ]
    optimizer: Any = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps, foreach=False)
    if settings.name == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=settings.momentum, foreach=False)
    numbers = []
    for number in range(steps):
        loss = ranks.loss_sum(made, ranks.tokens(number), ranks.total_weight(number))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), CLIP).item()
        for group in optimizer.param_groups:
            group["lr"] = LR / (number + 1) * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad()
        numbers.append((loss.item(), norm))
    return numbers, {name: p.detach().clone() for name, p in made.named_parameters()}


def save(worker: Any, case: dict[str, Any], folder: str, saved_at: int, steps: int) -> list[tuple[float, float]]:
    """Train, writing a checkpoint before step `saved_at`; losses and norms of the steps from there."""
    from swift_dist.checkpoint import CheckpointWriter

    with ranks.joined(worker):
        writer = CheckpointWriter(Path(folder), keep=1, keep_every=0, attempt=0, async_save=False)
        held = strategy(job(**case["job"]), model(case))
        numbers = []
        for number in range(steps):
            if number == saved_at:
                writer.save(number, held.sharded_state(is_loading=False), {})
            numbers.append(step(held, number, worker))
        writer.close()
        held.close()
    return numbers[saved_at:]


def resume(worker: Any, cases: list[dict[str, Any]], folder: str, saved_at: int, steps: int) -> list[Any]:
    """The same steps from the checkpoint, for each case, by models that begin elsewhere."""
    from swift_dist.checkpoint import load, newest_whole

    found = []
    with ranks.joined(worker):
        for case in cases:
            made = model(case)
            with torch.no_grad():
                for parameter in made.parameters():
                    if parameter.requires_grad:
                        parameter.fill_(math.nan)
            held = strategy(job(**case["job"]), made)
            checkpoint = newest_whole(Path(folder))
            assert checkpoint is not None
            held.load_sharded_state(load(checkpoint, held.sharded_state(is_loading=True)))
            found.append([step(held, number, worker) for number in range(saved_at, steps)])
            held.close()
    return found
