"""What ranks do in the tests of strategies ddp and fsdp2. See ranks.py."""

from __future__ import annotations

import copy
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import ranks
import torch

from swift_dist.config import JobConfig
from swift_dist.engines.hf.strategies import fsdp2
from swift_dist.engines.hf.strategies.base import Setting
from swift_dist.engines.tracebacks import no_references_in_tracebacks
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


def move(module: Any, number: int) -> None:
    """Let one layer learn at a time, as LISA does."""
    for index, layer in enumerate(module.model.layers):
        layer.requires_grad_(index == number % 2)


def drop_steps(held: Any, worker: Any) -> None:
    """A step that is skipped with its norm known, and one before."""
    accumulate(held, 17, worker)
    assert held.gradient_norm() > 0
    held.skip()
    batch = ranks.micro_batches(18, worker.rank, worker.world_size)[0]
    with held.accumulate(False):
        held.backward(ranks.loss_sum(held.module, batch, 1.0))
    with torch.no_grad():  # an evaluation in between
        held.module(input_ids=batch[0])
    held.skip()


def train(worker: Any, cases: list[dict[str, Any]], steps: int) -> list[Any]:
    """For each case: losses and norms, whole weights (rank 0) and held bytes."""
    found = []
    with ranks.joined(worker):
        for case in cases:
            fsdp2.WHOLE_GRADIENT_BYTES = case.get("whole_gradients", 1 << 30)
            made = model(case)
            names = [name for name, _ in made.named_parameters()]
            held = strategy(job(**case["job"]), made)
            numbers = []
            for number in range(steps):
                if case.get("moves"):
                    move(made, number)
                if case.get("skips"):
                    drop_steps(held, worker)
                numbers.append(step(held, number, worker))
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
        if case.get("moves"):
            move(made, number)
        loss = ranks.loss_sum(made, ranks.tokens(number), ranks.total_weight(number))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), CLIP).item()
        for group in optimizer.param_groups:
            group["lr"] = LR / (number + 1) * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad()
        numbers.append((loss.item(), norm))
    return numbers, {name: p.detach().clone() for name, p in made.named_parameters()}


def save(worker: Any, cases: list[dict[str, Any]], folder: str, saved_at: int, steps: int) -> list[Any]:
    """Train each case, writing a checkpoint before step `saved_at`; losses and norms of the steps from there, and what
    it holds of the model."""
    from swift_dist.checkpoint import CheckpointWriter

    found = []
    with ranks.joined(worker):
        for number, case in enumerate(cases):
            writer = CheckpointWriter(Path(folder) / str(number), keep=1, keep_every=0, attempt=0, async_save=False)
            made = model(case)
            held = strategy(job(**case["job"]), made)
            numbers: list[tuple[float, float]] = []
            keys: list[str] = []
            for index in range(steps):
                if case.get("moves"):
                    move(made, 0)  # the other layer is never updated
                if index == saved_at:
                    state = held.sharded_state(is_loading=False)
                    keys = sorted(piece.key for part in ("model", "optimizer") for piece in state[part].values())
                    writer.save(index, state, {})
                numbers.append(step(held, index, worker))
            found.append((numbers[saved_at:], keys))
            writer.close()
            held.close()
    return found


def resume(worker: Any, cases: list[dict[str, Any]], folder: str, saved_at: int, steps: int) -> list[Any]:
    """The same steps from the checkpoints, by models whose weights that learn begin elsewhere."""
    from swift_dist.checkpoint import load, newest_whole

    found = []
    with ranks.joined(worker):
        for number, case in enumerate(cases):
            made = model(case)
            with torch.no_grad():
                for parameter in made.parameters():
                    if parameter.requires_grad:
                        parameter.fill_(math.nan)
            held = strategy(job(**case["job"]), made)
            with torch.no_grad():  # what is gathered here must not be used again
                held.module(input_ids=ranks.tokens(0)[0])
            checkpoint = newest_whole(Path(folder) / str(number))
            assert checkpoint is not None
            held.load_sharded_state(load(checkpoint, held.sharded_state(is_loading=True)))
            numbers = []
            for index in range(saved_at, steps):
                if case.get("moves"):
                    move(made, 0)
                numbers.append(step(held, index, worker))
            found.append(numbers)
            held.close()
    return found


def overflow(worker: Any, cases: list[dict[str, Any]]) -> list[Any]:
    """fp16: a step whose gradients overflow is skipped, and the next one is taken."""
    found = []
    with ranks.joined(worker):
        for case in cases:
            made = model(case)
            names = [name for name, parameter in made.named_parameters() if parameter.requires_grad]
            held = strategy(job(**case["job"]), made)
            before = dict(held.whole_weights(names))
            scales = [held.loss_scale]
            accumulate(held, 0, worker, factor=1e6)
            norm = held.gradient_norm()
            held.skip()
            scales.append(held.loss_scale)
            after = dict(held.whole_weights(names))
            unchanged = all(torch.equal(before[name], after[name]) for name in before)
            while True:
                accumulate(held, 0, worker)
                good = held.gradient_norm()
                if math.isfinite(good):
                    break
                held.skip()
                scales.append(held.loss_scale)
            held.update(LR, good)
            moved = [name for name, w in held.whole_weights(names) if not torch.equal(w, after[name])]
            found.append({"norm": norm, "good": good, "scales": scales, "unchanged": unchanged, "moved": len(moved)})
            held.close()
    return found


class Towers(torch.nn.Module):
    """Weights that a batch may use or not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.all, self.first, self.none = (torch.nn.Linear(6, 6) for _ in range(3))

    def forward(self, inputs: torch.Tensor, is_first: bool) -> torch.Tensor:
        hidden = self.all(inputs)
        return (self.first(hidden) if is_first else hidden).square().mean()


def use_other_weights(worker: Any, jobs: list[dict[str, Any]]) -> list[Any]:
    """Rank 0 uses a weight that others do not; one is used by nobody."""
    found = []
    with ranks.joined(worker):
        for settings in jobs:
            held = strategy(job(**settings), Towers())
            for number in range(2):
                for is_last in (False, True):
                    with held.accumulate(is_last):
                        inputs = torch.full((3, 6), 1.0 + number + worker.rank)
                        held.backward(held.module(inputs, worker.rank == 0 and not is_last))
                held.update(LR, held.gradient_norm())
            found.append(dict(held.whole_weights(list(Towers().state_dict()))))
            held.close()
    return found


def use_other_weights_alone(settings: dict[str, Any], world: int) -> dict[str, torch.Tensor]:
    made = Towers()
    section = job(**settings).optimizer
    optimizer = make_optimizer(parameter_groups(made, section, lr_scale), section, torch.device("cpu"))
    for number in range(2):
        for rank in range(world):
            for is_last in (False, True):
                made(torch.full((3, 6), 1.0 + number + rank), rank == 0 and not is_last).backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return made.state_dict()


def half_precision(worker: Any, cases: list[dict[str, Any]], dtype: str) -> list[Any]:
    """Two steps with frozen weights in the compute precision: losses and norms, and the dtypes of what is held."""
    found = []
    with ranks.joined(worker):
        for case in cases:
            made = model(case)
            for parameter in made.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(getattr(torch, dtype))
            held = strategy(job(**case["job"]), made)
            dtypes = {str(p.dtype) for p in made.parameters() if p.requires_grad}
            found.append(([step(held, number, worker) for number in range(2)], dtypes))
            held.close()
    return found


def frozen(worker: Any) -> tuple[float, int, int]:
    """A sharded reference: how far its logits are from the whole model's, and bytes held of how many."""
    from swift_dist.engines.hf.strategies._torch import num_bytes

    with ranks.joined(worker), torch.no_grad():
        made = ranks.tiny().requires_grad_(False)
        drawn, whole = ranks.tokens(3 + worker.rank)[0], num_bytes(made.parameters())
        expected = made(input_ids=drawn).logits
        sharded = fsdp2.shard_frozen(made, job(strategy={"deepspeed": "zero3"}), torch.device("cpu"))
        off = max((sharded(input_ids=drawn).logits - expected).abs().max().item() for _ in range(2))
        return off, num_bytes(sharded.parameters()), whole


def refused(worker: Any, settings: dict[str, Any]) -> str:
    from swift_dist.errors import JobError

    with ranks.joined(worker):
        try:
            strategy(job(**settings), ranks.tiny())
        except JobError as error:
            return str(error)
    return ""


def lose_a_peer(worker: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The last of four ranks dies in the middle of training; the others notice and leave, and two of them go on as a
    smaller gang in the same process."""
    with ranks.joined(worker):
        held = strategy(job(**settings), ranks.tiny())
        step(held, 0, worker)
        if worker.rank == worker.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        try:
            with no_references_in_tracebacks():
                for number in range(1, 100):
                    step(held, number, worker)
            raise AssertionError("nobody noticed")
        except RuntimeError as error:
            message = str(error)
        held.close()
        del held
    seconds = time.monotonic() - began
    # a process that ends closes its sockets, whatever it holds: all stay until each has noticed
    (worker.run_dir / f"left-{worker.rank}").touch()
    while len(list(worker.run_dir.glob("left-*"))) < worker.world_size - 1 and time.monotonic() - began < 90:
        time.sleep(0.01)
    again = copy.copy(worker)
    again.attempt, again.world_size = 1, 2
    numbers = train(again, [{"job": settings}], 1)[0][0] if worker.rank < 2 else None
    return {"message": message, "seconds": seconds, "numbers": numbers}
