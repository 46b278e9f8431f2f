"""Time and peak memory of `token_logps`, forward and backward, beside torch's cross entropy on the same logits.

Cross entropy takes the logits as float32, as transformers' losses do (``logits.float()``). Each run is a process of its
own, one after the other, and gives the seconds and the highest resident memory beyond the logits, in units of the
logits; printed are medians. The gradient itself is 1.0 x the logits, except where it is written over them. To be at
most as slow as cross entropy, and to take at most 1.25 x the logits in float32 and 1.25 x in bfloat16 (0.25 x reused).

    python tests/benchmarks/bench_logps.py [--tokens 2048] [--vocabulary 32000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

CASE = """
import json, resource, sys, time
import torch
from swift_dist.engines.hf.logps import token_logps

how, dtype, tokens, vocabulary = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])


def run(tokens, vocabulary):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 16, dtype=dtype)
    weight = torch.randn(16, vocabulary, dtype=dtype, requires_grad=True)
    logits, labels = hidden @ weight, torch.randint(0, vocabulary, (tokens,))
    before, begin = peak(), time.perf_counter()
    if how == "cross_entropy":
        values = -torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    else:
        values = token_logps(logits, labels, reuse_logits=how == "reuse")
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    return time.perf_counter() - begin, (peak() - before) / (logits.numel() * logits.element_size())


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


run(64, 1000)
print(json.dumps(run(tokens, vocabulary)))
"""
WAYS = ("cross_entropy", "keep", "reuse")


def run(how: str, dtype: str, tokens: int, vocabulary: int) -> tuple[float, float]:
    words = [sys.executable, "-c", CASE, how, dtype, str(tokens), str(vocabulary)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds, memory = json.loads(done.stdout)
    return seconds, memory


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    failed = False
    for dtype in ("float32", "bfloat16"):
        rounds = [{how: run(how, dtype, args.tokens, args.vocabulary) for how in WAYS} for _ in range(args.rounds)]
        for how in WAYS:
            ratio = statistics.median(one[how][0] / one["cross_entropy"][0] for one in rounds)
            memory = statistics.median(one[how][1] for one in rounds)
            limit = {"cross_entropy": float("inf"), "keep": 1.25, "reuse": 0.25}[how]
            wrong = ratio > 1 or memory > limit
            failed |= wrong
            print(f"{dtype:9} {how:14} time {ratio:5.2f} x  memory {memory:5.2f} x logits{'  TOO MUCH' * wrong}")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
