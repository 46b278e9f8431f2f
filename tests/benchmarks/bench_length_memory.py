"""Peak bytes of activations of a rank, against the number of ranks that share a row, and with each memory feature on
and off: measured, and by the formulas of swift_dist/parallel/memory.py.

Bytes are those of torch's CPU allocator from the first layer to the last gradient (`live_bytes.peak_bytes`), without
weights, their gradients and what lies in the host's memory: the same number in every run, and no times. The model is a
llama in fp32 without features (first table: the total length is the same for every N), or with those named (second
table, on one number of ranks). To be shown: peak = c N^-s with s within 15 % of 1.

    python tests/benchmarks/bench_length_memory.py [--tokens 4096] [--ranks 1,2,4,8] [--features_ranks 2]
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "support"), str(TESTS / "engines" / "hf")]

import length_ranks  # noqa: E402
import ranks  # noqa: E402
from gang import Gang  # noqa: E402

from swift_dist.parallel import ModelShape  # noqa: E402
from swift_dist.parallel.memory import MemoryFeatures, activation_bytes  # noqa: E402

NAMES = ("recompute", "tiled_loss", "tiled_mlp", "offload")
FEATURES: tuple[tuple[str, ...], ...] = (
    (),
    ("tiled_loss",),
    ("tiled_mlp",),
    ("tiled_loss", "tiled_mlp"),
    ("recompute",),
    ("recompute", "tiled_loss"),
    ("recompute", "tiled_loss", "tiled_mlp"),
    ("recompute", "tiled_loss", "offload"),
    ("recompute", "tiled_loss", "tiled_mlp", "offload"),
)


def measure(gang: Gang, world: int, tokens: int, features: list[tuple[str, ...]], ring: bool = False) -> list[int]:
    """The most of all ranks, for each set of features. The row is one sequence, which every rank takes a part of."""
    cases: list[dict[str, Any]] = [dict.fromkeys(names, True) for names in features]
    arguments = {"cases": cases, "lengths": [tokens], "ring": ring}
    by_rank = gang.run(length_ranks.__file__, "measure", world, 900, **arguments)
    return [max(found) for found in zip(*by_rank, strict=True)]


def predicted(world: int, tokens: int, names: tuple[str, ...]) -> int:
    sizes = length_ranks.SIZES
    shape = ModelShape(
        num_layers=sizes["num_hidden_layers"],
        hidden_size=sizes["hidden_size"],
        num_attention_heads=sizes["num_attention_heads"],
        num_query_groups=sizes["num_key_value_heads"],
        head_dim=sizes["hidden_size"] // sizes["num_attention_heads"],
        ffn_hidden_size=sizes["intermediate_size"],
        vocab_size=sizes["vocab_size"],
    )
    features = MemoryFeatures(**dict.fromkeys(names, True))
    return activation_bytes(shape, tokens, features, sharing_ranks=world, element_bytes=4).peak


def slope(numbers: list[int], peaks: list[int]) -> float:
    """Of log peak against log N, by least squares, its sign turned: 1 where N ranks need 1/N each."""
    x, y = [math.log(number) for number in numbers], [math.log(peak) for peak in peaks]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return -covariance / sum((a - mean_x) ** 2 for a in x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--ranks", default="1,2,4,8")
    parser.add_argument("--features_ranks", type=int, default=2)
    arguments = parser.parse_args()
    numbers, tokens = [int(number) for number in arguments.ranks.split(",")], arguments.tokens
    gang, failed = Gang(imports=ranks.IMPORTS), False
    for names, ring in (((), False), ((), True), (("recompute", "tiled_loss", "tiled_mlp", "offload"), False)):
        peaks = [measure(gang, number, tokens, [names], ring)[0] for number in numbers]
        found = slope(numbers, peaks)
        failed |= not names and abs(found - 1) > 0.15  # with all of it, what does not depend on N shows at this size
        print(f"\n{', '.join(names) or 'nothing'}, {'ring' if ring else 'Ulysses'}, {tokens} tokens: s = {found:.3f}")
        for number, peak in zip(numbers, peaks, strict=True):
            formula = predicted(number, tokens, names) / peak
            times = peak * number / peaks[0]
            print(f"{number:3} ranks {peak / 2**20:8.2f} MiB  x N {times:5.2f}  formula {formula:5.2f}")
    world = arguments.features_ranks
    peaks = measure(gang, world, tokens, list(FEATURES))
    print(f"\n{world} ranks, {tokens} tokens")
    for names, peak in zip(FEATURES, peaks, strict=True):
        share, formula = peak / peaks[0], predicted(world, tokens, names) / peak
        words = ", ".join(names) or "nothing"
        print(f"{peak / 2**20:8.2f} MiB  {share:5.3f} of nothing  formula {formula:5.2f}  {words}")
    gang.close()
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
