"""Time from the command to the first step done, against a bare torchrun script that imports the same libraries.

The three kinds take turns, so that a busy machine slows all of them alike; the ratio is taken within each turn.

    python tests/benchmarks/bench_startup.py [--runs 5] [--check]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ray
from tiny_job import write_tiny_job

from swift_dist.cluster.devices import Devices
from swift_dist.cluster.runtime import Cluster
from swift_dist.config.job import ClusterSection

LIMITS = {"own cluster": 2.2, "running cluster": 1.3}
BIN = Path(sys.executable).parent
BARE = """
import os, pathlib, sys, time, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed as dist
import pydantic, yaml, numpy
import megatron.core
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
dist.init_process_group("gloo")
model = torch.nn.Linear(64, 64)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(4, 64)).sum().backward()
for p in model.parameters():
    dist.all_reduce(p.grad)
optimizer.step()
if dist.get_rank() == 0:
    pathlib.Path(sys.argv[1]).write_text("done")
dist.barrier()
dist.destroy_process_group()
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="fail if a limit is exceeded")
    options = parser.parse_args()
    times: dict[str, list[float]] = {"torchrun": [], "running cluster": [], "own cluster": []}
    stages: dict[str, list[dict[str, float]]] = {"running cluster": [], "own cluster": []}
    running = Cluster(ClusterSection(nproc_per_node=2))
    with tempfile.TemporaryDirectory() as name, running:
        folder = Path(name)
        job = write_tiny_job(folder, train={"steps": 2})
        script = folder / "bare.py"
        script.write_text(BARE)
        running.start(Devices(use_gpu=False, nproc_per_node=2))
        running.connect()
        address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        for turn in range(options.runs + 1):  # the first turn warms the page cache and is not counted
            for kind in times:
                output = folder / f"{kind.split()[0]}-{turn}"
                if kind == "torchrun":
                    seconds = bare(script, output)
                else:
                    seconds = ours(job, output, address if kind == "running cluster" else {})
                time.sleep(1.0)  # processes of the run before have gone
                if turn:
                    times[kind].append(seconds)
                    if kind in stages:
                        stages[kind].append(read_stages(output, seconds))
    ratios = {kind: [t / b for t, b in zip(times[kind], times["torchrun"], strict=True)] for kind in LIMITS}
    report = {
        "seconds": {kind: round(statistics.median(values), 2) for kind, values in times.items()},
        "ratio": {kind: round(statistics.median(values), 2) for kind, values in ratios.items()},
        "limit": LIMITS,
        "stages": {kind: medians(values) for kind, values in stages.items()},
        "runs": options.runs,
        "load": os.getloadavg(),
    }
    print(json.dumps(report, indent=2))
    too_slow = [kind for kind, limit in LIMITS.items() if report["ratio"][kind] > limit]
    return 1 if options.check and too_slow else 0


def bare(script: Path, flag: Path) -> float:
    command = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2", str(script), str(flag)]
    return until(command, flag, dict(os.environ))


def ours(job: Path, output: Path, variables: dict[str, str]) -> float:
    """From the command to the first row of metrics.jsonl."""
    command = [str(BIN / "swift-dist"), "pretrain", str(job), "--output", str(output)]
    return until(command, output / "metrics.jsonl", {**os.environ, **variables})


def until(command: list[str], file: Path, variables: dict[str, str]) -> float:
    """Seconds until `file` has content; then lets the command finish."""
    began = time.perf_counter()
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        while not (file.exists() and file.stat().st_size):
            if child.poll() is not None and not file.exists():
                raise SystemExit(f"{command} failed:\n{child.communicate()[0]}")
            time.sleep(0.005)
        seconds = time.perf_counter() - began
        child.communicate()
    return seconds


def read_stages(output: Path, total: float) -> dict[str, float]:
    """Where the time went, as the driver's log tells it; the rest is building the model and the first step."""
    lines = (output / "logs" / "driver.log").read_text().splitlines()
    stages = next(json.loads(line.partition("start-up: ")[2]) for line in lines if "start-up: " in line)
    return {**stages, "build and first step": total - sum(stages.values())}


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(row[name] for row in rows), 2) for name in rows[0]} if rows else {}


if __name__ == "__main__":
    sys.exit(main())
