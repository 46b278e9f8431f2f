"""A tiny data-parallel loop with file checkpoints: what the gang's tests run instead of a model that takes seconds.

Deterministic: the weights after n steps are a function of n alone, so any restart must end with the same bits.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

WIDTH = 64


def main(payload: dict[str, Any], worker: Any) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    assert threading.current_thread() is threading.main_thread()
    _fault(payload, worker, "build", 0)
    worker.beat("build", 0)
    dist.init_process_group("gloo", store=worker.store(), rank=worker.rank, world_size=worker.world_size)
    worker.beat("load", 0)
    folder = worker.run_dir / "checkpoints"
    folder.mkdir(exist_ok=True)
    newest = max(folder.glob("step_*.pt"), key=lambda p: int(p.stem[5:]), default=None)
    state = torch.load(newest) if newest else {"step": 0, "w": torch.ones(WIDTH), "m": torch.zeros(WIDTH)}
    step, w, m = state["step"], state["w"], state["m"]
    first, stop, loss = step, False, 0.0
    while step < payload["steps"] and not stop:
        worker.beat("step", step)
        time.sleep(payload.get("step_seconds", 0.0))
        _fault(payload, worker, "step", step)
        x = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1000 * step + worker.rank))
        packed = torch.cat([2 * (w - x), ((w - x) ** 2).mean()[None], torch.tensor([float(worker.stop_requested())])])
        dist.all_reduce(packed)
        packed /= worker.world_size
        m = 0.9 * m + packed[:WIDTH]
        w = w - 0.05 * m
        loss, stop, step = packed[-2].item(), packed[-1].item() > 0, step + 1
        if step % payload.get("interval", 5) == 0 or stop or step == payload["steps"]:
            worker.beat("save", step)
            _fault(payload, worker, "save", step)
            if worker.rank == 0:
                temporary = folder / f"step_{step}.tmp"
                torch.save({"step": step, "w": w, "m": m}, temporary)
                temporary.rename(folder / f"step_{step}.pt")
            dist.barrier()
    worker.beat("final", step)
    _fault(payload, worker, "final", step)
    dist.destroy_process_group()
    return {
        "step": step,
        "first": first,
        "loss": loss,
        "stopped": stop and step < payload["steps"],
        "digest": hashlib.sha256(w.numpy().tobytes()).hexdigest(),
        "pid": os.getpid(),
        "attempt": worker.attempt,
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "environment": {name: os.environ.get(name) for name in payload.get("show", [])},
    }


def _fault(payload: dict[str, Any], worker: Any, phase: str, step: int) -> None:
    """Do what the payload asks for here: {"rank", "phase", "step", "do", "times", "after"}.

    `times` counts over attempts; `after` is a file that is waited for.
    """
    for fault in payload.get("faults", []):
        if (fault["rank"], fault["phase"]) != (worker.rank, phase) or fault.get("step", step) != step:
            continue
        done = Path(worker.run_dir) / f"fault-{fault['rank']}-{phase}-{fault.get('step', 'any')}"
        count = int(done.read_text()) if done.exists() else 0
        if count >= fault.get("times", 1):
            continue
        done.write_text(str(count + 1))
        while "after" in fault and not Path(fault["after"]).exists():
            time.sleep(0.02)
        if fault["do"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault["do"] == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault["do"] == "hang":
            time.sleep(3600)
        elif fault["do"] == "raise":
            raise ArithmeticError(f"asked for at step {step}")
        elif fault["do"] == "job":
            from swift_dist.errors import JobError

            raise JobError("train.steps", "wrong on purpose", "do not ask for it")
