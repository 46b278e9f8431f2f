"""Throughput of `swift-dist data prepare` against `tokenizers.encode_batch_fast` alone, on the same cores and text.

The floor is one process that holds every text in memory and does nothing but encode_batch_fast on all cores, 1,000
texts a call; reading, parsing, writing and start-up are not counted. `data prepare` is timed from the command to its
end, with all of that in it. Runs alternate; each pair gives one ratio; printed is the median. To be at least 0.85. The
ratio of CPU seconds is printed beside it: on a machine with other work it is the steadier one.

    python tests/benchmarks/bench_tokenize.py [--megabytes 100] [--pairs 5] [--cores 2]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

FLOOR = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[2] + "/tokenizer.json")
texts = [json.loads(line)["text"] for line in open(sys.argv[1], encoding="utf-8")]
tokenizer.encode_batch_fast(texts[:100])
begin, cpu, tokens = time.perf_counter(), time.process_time(), 0
for start in range(0, len(texts), 1000):
    encodings = tokenizer.encode_batch_fast(texts[start : start + 1000])
    tokens += sum(map(len, encodings))
seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
print(json.dumps({"seconds": seconds, "cpu": cpu, "tokens": tokens}))
"""
COMMAND = [sys.executable, "-c", "from swift_dist.cli import main; raise SystemExit(main())", "data"]


def write_corpus(path: Path, megabytes: float) -> None:
    """Real text that every machine has: the sources and documents of the Python installation, about 6 kB a row."""
    roots = [Path(sysconfig.get_paths()["stdlib"]), Path(sysconfig.get_paths()["purelib"])]
    left = megabytes * 1e6
    with path.open("w", encoding="utf-8") as out:
        for source in sorted(
            file for root in roots for suffix in ("py", "md", "rst") for file in root.rglob(f"*.{suffix}")
        ):
            try:
                text = source.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            for start in range(0, len(text), 6000):
                row = json.dumps({"text": text[start : start + 6000]}, ensure_ascii=False) + "\n"
                out.write(row)
                left -= len(row.encode())
            if left <= 0:
                return
    print(f"only {megabytes - left / 1e6:.0f} MB of text found", file=sys.stderr)


def run_floor(corpus: Path, tokenizer: Path, cores: int) -> dict:
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(cores)}
    words = [sys.executable, "-c", FLOOR, str(corpus), str(tokenizer)]
    return json.loads(subprocess.run(words, env=env, check=True, capture_output=True, text=True).stdout)


def run_prepare(corpus: Path, tokenizer: Path, output: Path, cores: int) -> dict:
    words = ["prepare", str(corpus), "--tokenizer", str(tokenizer), "--output", str(output), "--workers", str(cores)]
    begin, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*COMMAND, *words, "--overwrite", "true", "--json"], capture_output=True, text=True)
    seconds, now = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime  # the workers' included
    if done.returncode:
        raise SystemExit(done.stderr)
    result = json.loads(done.stdout)
    return {"seconds": seconds, "cpu": cpu, "tokens": result["tokens"], "own": result["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus, tokenizer, output = Path(folder) / "corpus.jsonl", Path(folder) / "tokenizer", Path(folder) / "out"
        write_corpus(corpus, given.megabytes)
        words = ["train-tokenizer", str(corpus), "--output", str(tokenizer), "--max_megabytes", "15"]
        subprocess.run([*COMMAND, *words], check=True, capture_output=True)
        ratios, cpu_ratios = [], []
        print(f"{corpus.stat().st_size / 1e6:.0f} MB JSONL, 32k byte-level BPE, {given.cores} cores")
        for pair in range(given.pairs):
            first = [lambda: run_floor(corpus, tokenizer, given.cores)]
            second = [lambda: run_prepare(corpus, tokenizer, output, given.cores)]
            done = [job() for job in (first + second if pair % 2 == 0 else second + first)]
            floor, tool = done if pair % 2 == 0 else done[::-1]
            assert floor["tokens"] == tool["tokens"], (floor, tool)
            ratios.append(floor["seconds"] / tool["seconds"])
            cpu_ratios.append(floor["cpu"] / tool["cpu"])
            print(
                f"pair {pair + 1}: encode_batch_fast {floor['tokens'] / floor['seconds'] / 1e6:.2f} Mtok/s, "
                f"data prepare {tool['tokens'] / tool['seconds'] / 1e6:.2f} Mtok/s "
                f"({tool['own']:.1f} of {tool['seconds']:.1f} s after start-up), "
                f"ratio {ratios[-1]:.3f}, of CPU seconds {cpu_ratios[-1]:.3f}",
                flush=True,
            )
        print(
            f"median ratio {statistics.median(ratios):.3f} (range {min(ratios):.3f} to {max(ratios):.3f}), "
            f"of CPU seconds {statistics.median(cpu_ratios):.3f}"
        )


if __name__ == "__main__":
    main()
