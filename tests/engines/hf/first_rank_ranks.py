"""What ranks do in the tests of weights that only the first rank reads. See ranks.py."""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import time
from pathlib import Path
from typing import Any

import ranks
import torch

from swift_dist.config import JobConfig
from swift_dist.engines.hf.strategies import _first_rank as first_rank
from swift_dist.errors import JobError, RunError


def job(model: str, settings: dict[str, Any]) -> JobConfig:
    base = {
        "task": "sft",
        "data": {"padding_free": False},
        "model": {"path": model},
        "train": {"steps": 3, "micro_batch_size": 1, "global_batch_size": 2, "precision": "fp32", "seed": 3},
    }
    return JobConfig.model_validate(
        {key: {**base.get(key, {}), **settings.get(key, {})} for key in base | settings if key != "task"}
        | {"task": settings.get("task", "sft")}
    )


def engine(worker: Any, wanted: JobConfig) -> Any:
    from swift_dist.engines.hf.engine import HFEngine

    config = json.loads((Path(wanted.model.path or "") / "config.json").read_text())
    return HFEngine(wanted, config, worker)


def _again(worker: Any, attempt: int) -> Any:
    """A worker whose attempt has a store of its own: one process makes one engine after the other."""
    found = copy.copy(worker)
    found.attempt = attempt
    return found


def built(worker: Any, cases: list[dict[str, Any]], alone: bool) -> list[dict[str, Any]]:
    """What engines hold before their first step, with weights read by the first rank `alone` or by all."""
    found = []
    wanted = first_rank.reads_alone
    first_rank.reads_alone = wanted if alone else lambda *_, **__: False
    try:
        for number, case in enumerate(cases):
            found.append(_built(engine(_again(worker, 2 * number + alone), job(**case)), alone))
            gc.collect()
    finally:
        first_rank.reads_alone = wanted
    return found


def _built(made: Any, alone: bool) -> dict[str, Any]:
    """Weights (first rank), buffers, the tuners' state, masters' pieces and what the model computes (every rank)."""
    assert not [name for name, t in made.model.named_buffers() if t.is_meta]
    tokens = torch.arange(3, 23).view(2, 10)
    with torch.no_grad(), made.inference():
        outputs = made.strategy.module(input_ids=tokens, use_cache=False).logits
        reference = made.reference and made.reference._module
        if reference is not None:
            outputs = torch.stack([outputs, reference(input_ids=tokens, use_cache=False).logits])
    names = list(dict(made.model.named_parameters()))
    pieces = made.strategy.sharded_state(is_loading=False)["model"]
    found = {
        "weights": dict(made.strategy.whole_weights(names)),
        "logits": outputs.clone(),
        "buffers": {name: buffer.clone() for name, buffer in made.model.named_buffers()},
        "tuners": {name: t for state in made.tuners.state(made.model).values() for name, t in state.items()},
        "pieces": {f"{key} {p.global_offset}": p.data.clone() for key, p in pieces.items()},
        "learns": sorted(name for name, p in made.model.named_parameters() if p.requires_grad),
        "objects": len({id(p) for p in made.model.parameters()}),
    }
    made.close()
    return found


def start(worker: Any, model: str, tiny: str, settings: dict[str, Any], alone: bool) -> dict[str, float]:
    """Peak of the resident size above what it was, and seconds, until an engine can take its first step."""
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed is given back, as large tensors always are
    wanted = first_rank.reads_alone
    first_rank.reads_alone = wanted if alone else lambda *_, **__: False
    try:
        engine(_again(worker, 0), job(tiny, settings)).close()  # what is imported once
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before, began = _status("VmRSS"), time.monotonic()
        made = engine(_again(worker, 1), job(model=model, settings=settings))
        found = {
            "peak": _status("VmHWM") - before,
            "after": _status("VmRSS") - before,
            "seconds": time.monotonic() - began,
        }
        made.close()
    finally:
        first_rank.reads_alone = wanted
    return found


def _status(name: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def failing(worker: Any, rank: int, kind: str) -> str:
    """One rank fails; what this one raises."""
    with ranks.joined(worker):
        try:
            with first_rank.failing_together(True):
                if worker.rank == rank:
                    raise {"job": JobError("model.path", "is broken", "mend it"), "other": OSError("no disk")}[kind]
        except (JobError, RunError, OSError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def different(worker: Any) -> str:
    """Ranks whose models differ in what learns."""
    with ranks.joined(worker):
        made = ranks.tiny()
        made.model.norm.weight.requires_grad_(worker.rank == 0)
        try:
            first_rank.require_alike(made)
        except RunError as error:
            return str(error)
    return ""


class Parts(torch.nn.Module):
    """Tensors of every kind: shared, without a dimension, of no element, not contiguous, integers, plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 5).t())
        self.twin = self.weight
        self.rounded = torch.nn.Parameter(torch.randn(2).bfloat16(), requires_grad=False)
        self.register_buffer("scalar", torch.randn(()), persistent=False)
        self.register_buffer("none", torch.zeros(0))
        self.register_buffer("mask", torch.rand(7) < 0.5)
        self.kept = torch.randint(9, (4,))


def handed_out(worker: Any) -> tuple[bool, dict[str, torch.Tensor]]:
    """Tensors of `Parts` on this rank, and whether the shared weight is still one."""
    with ranks.joined(worker):
        torch.manual_seed(worker.rank)
        with torch.device("cpu" if worker.rank == 0 else "meta"):
            made = Parts()
        optimizer = torch.optim.SGD([made.weight], lr=0.1)
        first_rank.hand_out_the_rest(made, torch.device("cpu"))
        first_rank.hand_out(first_rank.parameters_of(made), torch.device("cpu"))
        tensors = {**dict(made.named_parameters()), **dict(made.named_buffers()), "kept": made.kept}
        held = optimizer.param_groups[0]["params"][0]
        return made.weight is made.twin is held, {name: tensor.detach().clone() for name, tensor in tensors.items()}
