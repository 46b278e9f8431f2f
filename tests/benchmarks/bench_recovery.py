"""Time from SIGKILL of a rank to the next step done, checkpoint restored: fresh replacement and warm spare.

A tiny model is trained without end in one command; ranks are killed one after the other, in turn with and without a
spare. Before each kill a checkpoint is whole.

    python tests/benchmarks/bench_recovery.py [--kills 5] [--check]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tiny_job import write_tiny_job

LIMITS = {"fresh": 4.0, "spare": 1.5}
BIN = Path(sys.executable).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="fail if a limit is exceeded")
    options = parser.parse_args()
    times = {}
    for kind in LIMITS:
        with tempfile.TemporaryDirectory() as name:
            times[kind] = recover(Path(name), options.kills, spares=int(kind == "spare"))
    report = {
        "seconds": {kind: round(statistics.median(values), 2) for kind, values in times.items()},
        "all": {kind: [round(v, 2) for v in values] for kind, values in times.items()},
        "limit": LIMITS,
        "load": os.getloadavg(),
    }
    print(json.dumps(report, indent=2))
    too_slow = [kind for kind, limit in LIMITS.items() if report["seconds"][kind] > limit]
    return 1 if options.check and too_slow else 0


def recover(folder: Path, kills: int, spares: int) -> list[float]:
    job = write_tiny_job(
        folder,
        train={"steps": 1_000_000},
        checkpoint={"interval": 25},
        cluster={"spares": spares, "max_failures": kills + 1, "nproc_per_node": 2, "accelerator": "cpu"},
    )
    output = folder / "run"
    command = [str(BIN / "swift-dist"), "pretrain", str(job), "--output", str(output)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    times = []
    try:
        for kill in range(kills):
            wait_until(lambda: (output / "checkpoints" / "latest").exists(), child)
            time.sleep(12.0 if spares else 5.0)  # steps go by, and a spare has long finished its imports
            rank = kill % 2
            rows = len((output / "metrics.jsonl").read_bytes())
            began = time.perf_counter()
            os.kill(pid_of(output, rank), signal.SIGKILL)
            wait_until(lambda a=kill + 1: f"attempt {a}:" in (output / "logs" / "rank_0.log").read_text(), child)
            # The log of metrics is cut back to the checkpoint when it resumes: any growth after that is a new step.
            rows = min(rows, (output / "metrics.jsonl").stat().st_size)
            rows = first_growth(output / "metrics.jsonl", rows, child)
            times.append(time.perf_counter() - began)
    finally:
        child.send_signal(signal.SIGTERM)
        child.communicate()
    return times


def first_growth(path: Path, size: int, child: subprocess.Popen) -> int:
    """Wait until a row is written; a smaller file starts the wait afresh."""
    while True:
        now = path.stat().st_size
        if now > size:
            return now
        size = now
        assert child.poll() is None, child.communicate()[0]
        time.sleep(0.002)


def pid_of(output: Path, rank: int) -> int:
    lines = re.findall(r"attempt \d+: rank .*process (\d+)", (output / "logs" / f"rank_{rank}.log").read_text())
    return int(lines[-1])


def wait_until(condition, child: subprocess.Popen, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


if __name__ == "__main__":
    sys.exit(main())
