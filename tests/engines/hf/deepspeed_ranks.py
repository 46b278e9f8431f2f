"""What ranks do in the tests of strategy deepspeed. See ranks.py."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import ranks
import torch
import torch.distributed as dist

from swift_dist.config import JobConfig
from swift_dist.engines.hf.strategies.base import Setting
from swift_dist.errors import JobError, RunError
from swift_dist.plugins import find

IMPORTS = (*ranks.IMPORTS, "torch._dynamo", "deepspeed", "deepspeed.runtime.zero.stage3")
STEPS = 5
CLIP = 0.05
HALF = ("mlp", "norm")
"""Parts of the names of weights that learn where not all do."""


def job(deepspeed: str, precision: str = "fp32", **train: Any) -> JobConfig:
    """`deepspeed`: a preset, or "ddp" or "fsdp2" instead."""
    chosen = {"ddp": {}, "fsdp2": {"fsdp": "fsdp2"}}.get(deepspeed, {"deepspeed": deepspeed})
    return JobConfig.model_validate(
        {
            "task": "sft",
            "model": {"path": "/models/tiny"},
            "strategy": chosen,
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
    made = find("swift_dist.engines.hf.strategies", wanted.strategy.name, "STRATEGY")
    return made(module, Setting(wanted, torch.device("cpu"), None, adamw, groups))


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
    from swift_dist.checkpoint import CheckpointWriter

    writer = CheckpointWriter(Path(folder), keep=1, keep_every=0, attempt=0, async_save=False)
    writer.save(1, made.sharded_state(is_loading=False), {})
    writer.close()


def read(made: Any, folder: str) -> None:
    from swift_dist.checkpoint import load, newest_whole

    checkpoint = newest_whole(Path(folder))
    assert checkpoint is not None
    made.load_sharded_state(load(checkpoint, made.sharded_state(is_loading=True)))


def resume(worker: Any, cases: list[dict[str, Any]], steps: int) -> list[Any]:
    """Load into a model of other weights, and go on: the numbers of two steps, and the weights as they were loaded."""
    with ranks.joined(worker):
        return [_resume(steps=steps, **case) for case in cases]


def _resume(steps: int, folder: str, deepspeed: str, precision: str = "fp32", half: bool = False) -> Any:
    module = model(half)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.fill_(math.nan)
    made = strategy(module, job(deepspeed, precision))
    with torch.no_grad():  # what is gathered here must not be used again
        made.module(input_ids=ranks.tokens(0)[0])
    read(made, folder)
    loaded = dict(made.whole_weights(list(module.state_dict())))
    numbers = [step(made, number) for number in range(steps, steps + 2)]
    made.close()
    return numbers, loaded


def masters(
    worker: Any, folder: str, save: dict[str, Any], loads: list[dict[str, Any]]
) -> list[dict[str, torch.Tensor]]:
    """Save after two steps as ``folder``; load into other weights and save again, as ``folder-<number of the load>``.
    Returns what each computes with after its load."""
    with ranks.joined(worker):
        made = strategy(model(), job(**save))
        for number in range(2):
            step(made, number)
        write(made, folder)
        made.close()
        found = []
        for number, load in enumerate(loads):
            module = model(seed=8)
            made = strategy(module, job(**load))
            read(made, folder)
            write(made, f"{folder}-{number}")
            found.append(dict(made.whole_weights(list(module.state_dict()))))
            made.close()
        return found


class Towers(torch.nn.Module):
    """A model whose rows use one tower, the other, both or none."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(3)
            self.begin, self.left, self.right, self.end = (torch.nn.Linear(6, 6) for _ in range(4))

    def forward(self, rows: torch.Tensor, uses: str) -> torch.Tensor:
        hidden = torch.tanh(self.begin(rows))
        if "l" in uses:
            hidden = hidden + torch.tanh(self.left(hidden))
        if "r" in uses:
            hidden = hidden + torch.tanh(self.right(hidden))
        return self.end(hidden).square().mean()


def rows(number: int, rank: int, micro: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * number + 10 * rank + micro)
    return torch.randn(5, 6, generator=generator)


def towers_alone(uses: list[list[list[str]]]) -> dict[str, torch.Tensor]:
    """One process: a weight that a step does not use has a gradient of 0."""
    module = Towers()
    optimizer = adamw(groups(module))
    for number, by_rank in enumerate(uses):
        for rank, by_micro in enumerate(by_rank):
            for micro, which in enumerate(by_micro):
                module(rows(number, rank, micro), which).backward()
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate(number) * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def towers(worker: Any, presets: list[str], uses: list[list[list[str]]]) -> list[Any]:
    """Per preset the weights after some steps, or the error: ``uses[step][rank][micro-batch]``."""
    with ranks.joined(worker):
        return [_towers(name, uses, worker.rank) for name in presets]


def _towers(name: str, uses: list[list[list[str]]], rank: int) -> Any:
    module = Towers()
    made = strategy(module, job(name))
    try:
        for number, by_rank in enumerate(uses):
            for micro, which in enumerate(by_rank[rank]):
                made.backward(made.module(rows(number, rank, micro), which))
            made.update(rate(number), made.gradient_norm())
        return dict(made.whole_weights(list(module.state_dict())))
    except RunError as error:
        return str(error)
    finally:
        made.close()


def overflow(worker: Any, presets: list[str]) -> list[Any]:
    """fp16 (which DeepSpeed does not offer on a CPU unless told that it can): a step that overflows, and two beyond."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    with ranks.joined(worker):
        return [_overflow(name) for name in presets]


def _overflow(name: str) -> dict[str, Any]:
    module = model()
    made = strategy(module, job(name, "fp16", initial_loss_scale=256.0))
    first = [step(made, 0)]
    before = dict(made.whole_weights(list(module.state_dict())))
    scales = [made.loss_scale]
    norms = []
    for _ in range(2):
        gradients(made, 1, factor=1e7)
        norms.append(made.gradient_norm())
        made.skip()
        scales.append(made.loss_scale)
    after = dict(made.whole_weights(list(module.state_dict())))
    numbers = [*first, step(made, 1)]
    made.close()
    return {"norms": norms, "scales": scales, "numbers": numbers, "same": _equal(before, after)}


def _equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def manners(worker: Any) -> dict[str, Any]:
    """What else the engine relies on."""
    found: dict[str, Any] = {}
    with ranks.joined(worker):
        module = model(attention_dropout=0.5)
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        made = strategy(module, job("zero3"))
        found["numbers"] = [_numbers(module)]
        made.module.eval()
        found["modes"] = [made.module.training, module.training]
        with torch.no_grad():
            batch = ranks.tokens(0)
            found["eval"] = [ranks.loss_sum(made.module, batch, 1.0).item() for _ in range(2)]
        made.module.train()
        found["modes"] += [made.module.training, module.training]
        found["wanted"] = ranks.loss_sum(model().eval(), ranks.tokens(0), 1.0).item()
        found["finite"] = all(map(math.isfinite, step(made, 0)))
        next(module.parameters()).requires_grad_(False)
        gradients(made, 1)
        try:
            made.gradient_norm()
        except RunError as error:
            found["freeze"] = str(error)
        made.close()
    worker.attempt = 1
    with ranks.joined(worker):
        found["again"] = _train("zero2", drop=False)["numbers"]
        module = model(attention_dropout=0.5)
        made = strategy(module, job("zero3"))
        found["numbers"].append(_numbers(module))
        made.close()
    return found


def _numbers(module: Any) -> list[int]:
    """Those that DeepSpeed gave to modules and weights."""
    return [part.ds_id for part in (*module.modules(), *module.parameters())]


class Disk:
    """DeepSpeed's ``aio_handle`` without its C++: reads and writes are done when they are asked for."""

    def __init__(self, **settings: Any) -> None:
        self._pending, self._pinned = 0, []

    def new_cpu_locked_tensor(self, numel: int, example: torch.Tensor) -> torch.Tensor:
        self._pinned.append(torch.zeros(numel, dtype=example.dtype))
        return self._pinned[-1]

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> None:
        pass

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return any(t.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for t in self._pinned)

    def async_pwrite(self, tensor: torch.Tensor, path: str, offset: int) -> int:
        torch.save(tensor.clone(), path)
        self._pending += 1
        return 0

    def async_pread(self, tensor: torch.Tensor, path: str, offset: int) -> int:
        tensor.copy_(torch.load(path)[: tensor.numel()])
        self._pending += 1
        return 0

    def wait(self) -> int:
        done, self._pending = self._pending, 0
        return done


def nvme(worker: Any, folder: str, save: str) -> dict[str, Any]:
    """Train with state on a disk, save, load it into another, go on."""
    import types

    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.runtime.swap_tensor import optimizer_utils, partitioned_param_swapper

    AsyncIOBuilder.load = lambda self, verbose=False: types.SimpleNamespace(aio_handle=Disk)
    AsyncIOBuilder.is_compatible = lambda self, verbose=False: True
    for module in (optimizer_utils, partitioned_param_swapper):
        module.MIN_AIO_BYTES = module.MIN_SWAPPABLE_BYTES = 256  # of a tensor that goes to the disk
    device = {"device": "nvme", "nvme_path": folder, "pin_memory": False}
    zero = {"stage": 3, "sub_group_size": 10_000, "offload_optimizer": device}
    zero["offload_param"] = {**device, "buffer_size": 8192, "buffer_count": 40}
    file = Path(folder) / f"nvme{worker.rank}.json"
    file.write_text(json.dumps({"aio": {"block_size": 64}, "zero_optimization": zero}))
    found: dict[str, Any] = {}
    with ranks.joined(worker):
        try:
            strategy(model(), job(str(file)))
        except JobError as error:
            found["refused"] = str(error)
        get_accelerator().is_fp16_supported = lambda: True
        found["numbers"] = _save(2, save, str(file))
        found["files"] = len(list(Path(folder).rglob("*.swp")))
        found["again"] = _resume(2, save, str(file))[0]
        found["elsewhere"] = _resume(2, save, "zero2")[0]
        return found
