"""Packing of sequences: room used and seconds, against first-fit decreasing as the textbook has it.

Lengths are log-normal (what conversations look like), those beyond the capacity left out. First-fit decreasing looks
through the bins one by one, so it gets the first `--small` lengths only; both are timed on those, in turns, and ours on
all of them as well. The room used is to be at least 0.98; the ratio of seconds is printed.

    python tests/benchmarks/bench_packing.py [--count 1000000] [--small 20000] [--pairs 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from swift_dist.data.samples.packing import pack

CASES = ((4096, 300, 1.0), (4096, 900, 1.2), (32768, 900, 1.6))  # capacity, median, sigma of the logarithm


def first_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """Number of bins: each sequence, longest first, into the first bin that has room for it."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        for number, room in enumerate(rooms):
            if room >= length:
                rooms[number] -= length
                break
        else:
            rooms.append(capacity - length)
    return len(rooms)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--small", type=int, default=20_000)
    parser.add_argument("--pairs", type=int, default=5)
    given = parser.parse_args()
    for capacity, median, sigma in CASES:
        lengths = np.exp(np.random.default_rng(0).normal(np.log(median), sigma, given.count)).astype(np.int64).clip(1)
        lengths = lengths[lengths <= capacity]
        few = lengths[: given.small]
        listed = few.tolist()
        ratios = []
        for _ in range(given.pairs):
            ours, (_, ends) = timed(lambda few=few, capacity=capacity: pack(few, capacity))
            naive, bins = timed(lambda listed=listed, capacity=capacity: first_fit_decreasing(listed, capacity))
            ratios.append(naive / ours)
        seconds, (_, all_ends) = timed(lambda lengths=lengths, capacity=capacity: pack(lengths, capacity))
        print(
            f"capacity {capacity}, log-normal lengths of median {median}, sigma {sigma}:\n"
            f"  {len(few)} sequences: {len(ends)} bins, {few.sum() / (len(ends) * capacity):.4f} of the room used; "
            f"first-fit decreasing {bins} bins, {few.sum() / (bins * capacity):.4f}, "
            f"in {statistics.median(ratios):.0f} times the seconds (range {min(ratios):.0f} to {max(ratios):.0f})\n"
            f"  {len(lengths)} sequences: {len(all_ends)} bins, "
            f"{lengths.sum() / (len(all_ends) * capacity):.4f} of the room used, {seconds:.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
