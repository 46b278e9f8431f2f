"""Time and memory of `convert hf-to-megatron` and `megatron-to-hf` beside a plain copy of the same files.

The copy is ``cp -r --reflink=never`` and a sync of its files: what any conversion must do at least. Both read warm
files and write anew; runs alternate, each pair gives one ratio, the first is discarded. To hold: the command takes at
most 1.5 x the copy's time plus 3 s of start-up. Memory is the sum of Pss_Anon over all processes of the command,
sampled from smaps_rollup (mapped files do not count); to hold: at most 1 GiB + 2 x the largest tensor, at any size of
the model.

    python tests/benchmarks/bench_convert.py [--pairs 3] [--workers 2] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-c", "from swift_dist.cli import main; raise SystemExit(main())", "convert"]
COMMON = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "tie_word_embeddings": True}
SIZES: dict[str, dict[str, Any]] = {
    "0.7 GB": {
        "vocab_size": 64000,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        **COMMON,
    },
    "3.4 GB (Qwen3-1.7B)": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        **COMMON,
    },
}
SAMPLE_SECONDS = 0.02


@dataclass
class Run:
    seconds: float
    peak: int = 0


def write_model(folder: Path, config: dict[str, Any]) -> tuple[int, int]:
    """A model of random bf16 values in shards of 1.9 GB; returns (bytes, bytes of the largest tensor)."""
    import numpy as np

    from swift_dist.converters.mapping import hf_shapes
    from swift_dist.converters.safetensors_io import INDEX_NAME, TensorSpec, index_text, lay_out, plan_shards
    from swift_dist.models import find_family

    specs = [TensorSpec(name, shape, "BF16") for name, shape in hf_shapes(find_family(config).rows(config)).items()]
    shards = plan_shards(specs, 1_900_000_000)
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    noise = (generator.normal(0, 0.02, 1 << 22).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    for file in lay_out(shards).files:
        with (folder / file.name).open("wb") as stream:
            begin = max(offset + stream.write(content) for offset, content in file.literals)
            for start in range(begin, file.size, len(noise)):
                stream.write(noise[: file.size - start])
    if (text := index_text(shards)) is not None:
        (folder / INDEX_NAME).write_text(text)
    (folder / "config.json").write_text(json.dumps(config))
    return sum(spec.num_bytes for spec in specs), max(spec.num_bytes for spec in specs)


def anonymous(pid: int) -> int:
    """Bytes of anonymous memory of a process and all its descendants, shared pages divided by who shares them."""
    total, waiting = 0, [pid]
    while waiting:
        one = waiting.pop()
        try:
            text = Path(f"/proc/{one}/smaps_rollup").read_text()
            for task in Path(f"/proc/{one}/task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss_Anon")) * 1024
    return total


def run_convert(verb: str, source: Path, target: Path, workers: int) -> Run:
    return run_command([*COMMAND, verb, str(source), str(target), "--workers", str(workers), "--json"])


def run_command(command: list[str]) -> Run:
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    found = Run(0.0)

    def sample() -> None:
        while process.poll() is None:
            found.peak = max(found.peak, anonymous(process.pid))
            time.sleep(SAMPLE_SECONDS)

    sampler = threading.Thread(target=sample)
    sampler.start()
    _, errors = process.communicate()
    found.seconds = time.perf_counter() - begin
    sampler.join()
    if process.returncode:
        raise SystemExit(errors)
    return found


def measure_mbridge(source: Path, folder: Path) -> None:
    """Another project's conversion of the same model, which builds it; one process, the second run counts."""
    for number in range(2):
        target = folder / f"mbridge.{number}"
        run = run_command(
            [sys.executable, str(Path(__file__).with_name("mbridge_convert.py")), str(source), str(target)]
        )
        shutil.rmtree(target)
    print(f"  mbridge {version('mbridge')} hf-to-megatron {run.seconds:5.2f} s; memory {run.peak / 2**20:,.0f} MiB")


def run_copy(source: Path, target: Path) -> Run:
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", str(source), str(target)], check=True)
    subprocess.run(["sync", *map(str, target.rglob("*"))], check=True)
    return Run(time.perf_counter() - begin)


def seconds_of_start(verb: str, source: Path, target: Path) -> float:
    """A dry run: interpreter, imports, headers, plan."""
    begin = time.perf_counter()
    subprocess.run([*COMMAND, verb, str(source), str(target), "--dry_run", "true"], check=True, capture_output=True)
    return time.perf_counter() - begin


def measure(verb: str, source: Path, folder: Path, pairs: int, workers: int, largest: int) -> Path:
    """Print a line of the table; returns what the last conversion wrote."""
    runs: list[tuple[Run, Run]] = []
    target, copy = folder / f"{verb}.out", folder / f"{verb}.copy"
    for pair in range(pairs + 1):
        for path in (target, copy):
            shutil.rmtree(path, ignore_errors=True)
        os.sync()
        jobs = [lambda: run_copy(source, copy), lambda: run_convert(verb, source, target, workers)]
        done = [job() for job in (jobs if pair % 2 == 0 else jobs[::-1])]
        if pair:
            runs.append((done[0], done[1]) if pair % 2 == 0 else (done[1], done[0]))
    shutil.rmtree(copy)
    start = seconds_of_start(verb, source, folder / "absent")
    copied = statistics.median(copy.seconds for copy, _ in runs)
    taken = statistics.median(convert.seconds for _, convert in runs)
    peak = max(convert.peak for _, convert in runs)
    bound, memory = 1.5 * copied + 3, (1 << 30) + 2 * largest
    print(
        f"  {verb:15} cp -r + sync {copied:5.2f} s; convert {taken:5.2f} s, of which start and plan {start:.2f}; "
        f"{taken / bound:.2f} of the bound {bound:.2f} s; memory {peak / 2**20:,.0f} MiB, "
        f"{peak / memory:.2f} of the bound {memory / 2**20:,.0f} MiB; "
        f"after start-up {(taken - start) / copied:.2f} x the copy",
        flush=True,
    )
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to write about 12 GB (default: a temporary one)"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        for size, config in SIZES.items():
            folder = Path(name) / size.split()[0]
            num_bytes, largest = write_model(folder / "hf", config)
            print(
                f"{size}: {num_bytes / 1e9:.2f} GB, largest tensor {largest / 2**20:,.0f} MiB, {given.workers} workers"
            )
            written = measure("hf-to-megatron", folder / "hf", folder, given.pairs, given.workers, largest)
            measure("megatron-to-hf", written, folder, given.pairs, given.workers, largest)
            if find_spec("mbridge") is not None:
                measure_mbridge(folder / "hf", folder)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
