"""A rank of the hf engine, for `bench_alst.py`: torchrun ... length_ours.py CASE.json. Trains as a run does, and notes
each step's seconds and CPU seconds on rank 0, and how far its memory grows beyond what it is
before the first, until anything is exported."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from pathlib import Path
from typing import Any


def resident_gib() -> float:
    """Of this process, now."""
    return int(re.findall(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())[0]) / 2**20


def main(path: str) -> None:
    import torch

    from swift_dist import train
    from swift_dist.engines.hf.engine import HFEngine
    from swift_dist.runs.folder import RunFolder
    from swift_dist.runs.throughput import memory_gib
    from swift_dist.torchrun.rank import TorchrunWorker

    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    case: dict[str, Any] = json.loads(Path(path).read_text())
    found: dict[str, Any] = {"seconds": [], "cpu_seconds": [], "losses": [], "norm": None}
    held: dict[str, float] = {}
    train_step = HFEngine.train_step

    def timed(engine: HFEngine, *arguments: Any, **named: Any) -> Any:
        torch.distributed.barrier()
        held.setdefault("gib", resident_gib())
        wall, cpu = time.perf_counter(), time.process_time()
        result = train_step(engine, *arguments, **named)
        found["seconds"].append(time.perf_counter() - wall)
        found["cpu_seconds"].append(time.process_time() - cpu)
        found["losses"].append(result.loss)
        found["norm"] = found["norm"] or result.grad_norm
        found["memory_gib"] = memory_gib("cpu") - held["gib"]
        return result

    HFEngine.train_step = timed  # type: ignore[method-assign]
    worker = TorchrunWorker(RunFolder(case["output"]), on_cuda=False)
    train.main(case["payload"], worker)
    if worker.rank == 0:
        Path(case["result"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
