"""What a long row needs of memory: measured, against the number of ranks that share it, with each feature on and off,
and beside the formulas of swift_dist/parallel/memory.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import length_ranks
import pytest

from swift_dist.engines.hf import logps
from swift_dist.kernels import linear_cross_entropy
from swift_dist.parallel import ModelShape, memory
from swift_dist.parallel.memory import MemoryFeatures, activation_bytes

RANKS = Path(length_ranks.__file__)
LENGTHS = [300, 500, 224]
MARGIN = 0.15
"""Of the formulas, of what is measured."""

NOTHING: dict[str, Any] = {}
RECOMPUTED = {"recompute": True, "tiled_loss": True}
TILED = {**RECOMPUTED, "tiled_mlp": True}
ALL = {**TILED, "offload": True}
LOSS, LOSS_AND_MLP = {"tiled_loss": True}, {"tiled_loss": True, "tiled_mlp": True}
FEATURES = [NOTHING, RECOMPUTED, TILED, ALL, LOSS, LOSS_AND_MLP]
WIDE_HEADS = {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48}
CASES = [*FEATURES, {**TILED, "sizes": WIDE_HEADS}]
LARGE_VOCABULARY = {"vocab_size": 4096}
ALONE = [
    *CASES,
    {"sizes": WIDE_HEADS},
    *({**features, "sizes": LARGE_VOCABULARY} for features in (NOTHING, TILED)),
    {"dtype": "bfloat16"},
]


def test_tiles_of_the_formulas_are_those_that_are_computed() -> None:
    """The formulas import no torch, so they state both sizes once more."""
    assert memory._LEAST_ROWS == linear_cross_entropy._LEAST_ROWS
    assert memory._CHUNK_ELEMENTS == logps.CHUNK_ELEMENTS


def predicted(case: dict[str, Any], sharing_ranks: int) -> int:
    sizes = {**length_ranks.SIZES, **case.get("sizes", {})}
    shape = ModelShape(
        num_layers=sizes["num_hidden_layers"],
        hidden_size=sizes["hidden_size"],
        num_attention_heads=sizes["num_attention_heads"],
        num_query_groups=sizes["num_key_value_heads"],
        head_dim=sizes.get("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"]),
        ffn_hidden_size=sizes["intermediate_size"],
        vocab_size=sizes["vocab_size"],
    )
    found = activation_bytes(
        shape,
        sum(LENGTHS),
        MemoryFeatures(**{name: value for name, value in case.items() if name not in ("sizes", "dtype")}),
        sharing_ranks=sharing_ranks,
        element_bytes=2 if case.get("dtype") == "bfloat16" else 4,
    )
    return found.peak


@pytest.fixture(scope="module")
def measured(gang: Any) -> dict[int, list[list[int]]]:
    """Number of ranks -> rank -> bytes of each case."""
    wanted = {1: ALONE, 2: CASES}
    return {world: gang.run(RANKS, "measure", world, cases=c, lengths=LENGTHS) for world, c in wanted.items()}


def test_two_ranks_need_half_each(measured: dict[int, list[list[int]]]) -> None:
    for case, alone, *shared in zip(CASES, measured[1][0], *measured[2], strict=False):
        # beside a tile and the sums of its weights' gradients, which do not depend on the length
        limit = 0.6 if case.get("tiled_mlp") else 0.52
        assert 0.48 < max(shared) / alone < limit, case


def test_each_feature_saves(measured: dict[int, list[list[int]]]) -> None:
    for world, by_rank in measured.items():
        most = [max(found) for found in zip(*by_rank, strict=True)][: len(FEATURES)]
        nothing, recomputed, tiled, everything, loss, loss_and_mlp = most
        assert recomputed < 0.35 * nothing and loss < 0.96 * nothing
        assert tiled < 0.65 * recomputed and loss_and_mlp < 0.6 * loss
        inputs = sum(LENGTHS) // world * 4 * length_ranks.SIZES["hidden_size"]
        assert tiled - everything == pytest.approx((4 - 2) * inputs, rel=0.01), "two of four layers' inputs stay"


@pytest.mark.parametrize("world", [1, 2])
def test_formulas(measured: dict[int, list[list[int]]], world: int) -> None:
    for case, *by_rank in zip(ALONE if world == 1 else CASES, *measured[world], strict=True):
        assert predicted(case, world) == pytest.approx(max(by_rank), rel=MARGIN), case


def test_a_ring(gang: Any, measured: dict[int, list[list[int]]]) -> None:
    first, second = gang.run(RANKS, "measure", 2, cases=[NOTHING, TILED], lengths=LENGTHS, ring=True)
    for index, (case, limit) in enumerate(((NOTHING, 0.55), (TILED, 0.7))):
        alone = measured[1][0][CASES.index(case)]
        assert max(first[index], second[index]) < limit * alone
