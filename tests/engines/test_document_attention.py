"""Core attention of the megatron engine on samples of several documents, alone and with ranks that share samples."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import document_ranks as ranks
import pytest

RANKS = Path(ranks.__file__)
LENGTH = 24  # a multiple of 2 C for 1 to 4 ranks
SAMPLES: dict[str, list[list[int]] | None] = {
    "one each": None,
    "none ends": [[24], [24]],
    "one token each": [[1] * 24, [1] * 24],
    "single tokens first and last": [[1, 22, 1], [23, 1]],
    "shorter than 2 C": [[3, 2, 5, 1, 4, 2, 3, 4], [7, 1, 16]],
    "where chunks end": [[6, 6, 12], [12, 12]],
}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_against_the_formula(gang: Any, world: int) -> None:
    cases = [
        {"lengths": SAMPLES[name], "length": LENGTH, "window": window, "dropout": dropout}
        for name, window, dropout in itertools.product(
            SAMPLES, (None, 0, 3, 40), (ranks.NO_DROPOUT, ranks.TINY_DROPOUT)
        )
    ]
    for found in gang.run(RANKS, "compare", world, cases=cases):
        for case, differences in zip(cases, found, strict=True):
            kept = differences.pop("kept")
            assert max(differences.values()) < 1e-12, (case, differences)
            if world > 1 and not case["dropout"]:
                # of this rank's tokens: queries and output of 4 heads, keys and values of 2; a normaliser for each head
                assert kept <= 8 * 2 * LENGTH // world * (8 * (4 + 4 + 2 + 2) + 4)


def test_a_gpu_with_transformer_engine_keeps_documents_apart_too(gang: Any) -> None:
    """Its own attention would get the documents as a mask of another kind, and rotate all samples alike."""
    assert gang.run(RANKS, "beside_transformer_engine", 1, separate_documents=False) == [("Theirs", True)]
    assert gang.run(RANKS, "beside_transformer_engine", 1, separate_documents=True) == [("DotProductAttention", False)]
