"""Attention over a row that ranks share, forwards and backwards, beside one process that holds the whole row.

    python tests/benchmarks/bench_shared_attention.py [--ranks 2 4] [--tokens 8192] [--turns 5] [--check]

A row is one long sequence, 64 equal ones, or 64 of log-normal lengths; ranks share it by Ulysses, by a ring, or (of 4)
by both. Each rank computes with one thread, in fp32, over gloo. The ways take turns, and a turn begins and ends with
the one process, so that what else the machine does falls on all alike; printed are medians over turns of

    efficiency   (seconds of one process) / (ranks x seconds of the slowest rank), as long as every rank has a core
    work         (CPU seconds of all ranks, gloo's threads included) / (CPU seconds of one process): what sharing adds

`work` is the figure to trust on a busy machine, or with more ranks than cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

HEADS, KV_HEADS, WIDTH, SEQUENCES = 8, 4, 64, 64
LIMIT = 1.25
"""Most work of all ranks, as a multiple of one process's."""


def rows(tokens: int) -> dict[str, list[int]]:
    """Lengths of the sequences of each kind of row; of log-normal ones sigma is 1."""
    rng = random.Random(0)
    drawn = [rng.lognormvariate(0, 1) for _ in range(SEQUENCES)]
    uneven = [max(1, int(tokens * value / sum(drawn))) for value in drawn]
    uneven[0] += tokens - sum(uneven)
    return {"one": [tokens], "64 equal": [tokens // SEQUENCES] * SEQUENCES, "64 log-normal": uneven}


def ways(ranks: int) -> dict[str, tuple[int, int]]:
    """(Ulysses degree, ring degree) by name."""
    both = {"both": (2, ranks // 2)} if ranks > 2 and ranks % 2 == 0 else {}
    return {"ulysses": (ranks, 1), "ring": (1, ranks), **both}


def measured(run: Callable[[], Any]) -> tuple[float, float]:
    """(seconds, CPU seconds) of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def _alone(lengths: tuple[int, ...], whole: list[Any], gradient: Any) -> Callable[[], Any]:
    import torch

    from swift_dist.engines.hf.attention import attend_whole_rows

    inputs = [tensor.clone().requires_grad_() for tensor in whole]

    def run() -> Any:
        out, _ = attend_whole_rows(torch.nn.Module(), *inputs, lengths, scaling=WIDTH**-0.5)
        return torch.autograd.grad(out, inputs, gradient)

    return run


def _on_shared(shared: Any, whole: list[Any], gradient: Any) -> Callable[[], Any]:
    import torch

    from swift_dist.engines.hf.attention import attend_whole_rows
    from swift_dist.sequence_parallel.attention import shared_attention

    mine = shared.row.of(shared.ranks.rank)
    inputs, given = [tensor[:, :, mine].requires_grad_() for tensor in whole], gradient[:, mine]

    def run() -> Any:
        out, _ = shared_attention(
            attend_whole_rows, torch.nn.Module(), *inputs, None, scaling=WIDTH**-0.5, shared_row=shared
        )
        return torch.autograd.grad(out, inputs, given)

    return run


def rank_main(rank: int, world: int, tokens: int, turns: int, folder: str) -> None:
    """Every way on every row, and the one process (rank 0's) while the others wait."""
    import torch
    import torch.distributed as dist

    from swift_dist.sequence_parallel.degrees import Degrees
    from swift_dist.sequence_parallel.group import SharedRow, make_groups
    from swift_dist.sequence_parallel.row import Row

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    sharing = {name: make_groups(Degrees(*degrees), rank, world) for name, degrees in ways(world).items()}
    drawn = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, heads, tokens, WIDTH, generator=drawn) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    gradient = torch.randn(1, tokens, HEADS, WIDTH, generator=drawn)
    results = []
    for name, lengths in rows(tokens).items():
        shared = {way: SharedRow(ranks, Row(tuple(lengths), ranks.degrees)) for way, ranks in sharing.items()}
        calls = {way: _on_shared(row, whole, gradient) for way, row in shared.items()}
        calls["alone"] = _alone(tuple(lengths), whole, gradient)
        for turn in range(turns + 1):  # the first one warms up
            found: dict[str, Any] = {"row": name}
            for way in ("alone", *shared, "alone"):
                dist.barrier()
                if way != "alone" or rank == 0:
                    found.setdefault(way, []).append(measured(calls[way]))
            if turn:
                results.append(found)
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def compare(world: int, tokens: int, turns: int) -> list[dict[str, Any]]:
    """A line of the table for each row and way."""
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_main, (world, tokens, turns, folder), nprocs=world)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
    lines = []
    for row in rows(tokens):
        for way in ways(world):
            wall, work = [], []
            for of_ranks in zip(*ranks, strict=True):
                if of_ranks[0]["row"] != row:
                    continue
                alone = [statistics.mean(values) for values in zip(*of_ranks[0]["alone"], strict=True)]
                wall.append(alone[0] / (world * max(found[way][0][0] for found in of_ranks)))
                work.append(sum(found[way][0][1] for found in of_ranks) / alone[1])
            lines.append(
                {
                    "ranks": world,
                    "row": row,
                    "way": way,
                    "efficiency": round(statistics.median(wall), 2),
                    "work": round(statistics.median(work), 2),
                }
            )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--check", action="store_true", help=f"fail where work is beyond {LIMIT}")
    given = parser.parse_args()
    lines = [line for world in given.ranks for line in compare(world, given.tokens, given.turns)]
    print("| ranks | row | way | efficiency | work |\n|---|---|---|---|---|")
    for line in lines:
        print(f"| {line['ranks']} | {line['row']} | {line['way']} | {line['efficiency']:.2f} | {line['work']:.2f} |")
    print(f"load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    return int(given.check and any(line["work"] > LIMIT for line in lines))


if __name__ == "__main__":
    sys.exit(main())
