"""Shared rows: a model's loss, log-probabilities and every weight's gradient, beside one process that computes each
sequence by itself with transformers' own attention."""

from __future__ import annotations

from pathlib import Path

import pytest

FILE = Path(__file__).with_name("shared_row_ranks.py")
DEGREES = {2: [[2, 1], [1, 2]], 3: [[1, 3]], 4: [[4, 1], [2, 2], [1, 4]]}
ROWS = {
    "one": {"lengths": [37], "filling": 0},
    "packed": {"lengths": [9, 1, 22, 5, 1], "filling": 0},
    "padded": {"lengths": [13, 4], "filling": 12},
    "short": {"lengths": [2], "filling": 0},
    "many": {"lengths": [2, *[1] * 8], "filling": 0},
    "a ring rank with nothing cut": {"lengths": [2, 6, 11, 1, 7, 2, 6, 10, 10, 9, 3], "filling": 0},  # of (2, 2)
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LIMIT = {"float64": 1e-11, "float32": 1e-5}
LONG_ROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.5, 2.0, 3.0],
        "long_factor": [4.0, 8.0, 9.0, 16.0],
        "original_max_position_embeddings": 24,
        "factor": 4.0,
    },
    "original_max_position_embeddings": 24,
    "max_position_embeddings": 96,
    "partial_rotary_factor": 1.0,
}
DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "max_position_embeddings": 24,
}


def check(gang, rows, world, family="llama", settings=HEADS, dtype="float64", **others):
    arguments = {"family": family, "settings": settings, "dtype": dtype, "degrees": DEGREES[world], **others}
    for found in gang.run(FILE, "compare", world, rows=rows, **arguments):
        for row, cells in zip(rows, found, strict=True):
            for degrees, cell in zip(DEGREES[world], cells, strict=True):
                worst = max(cell["loss"], cell["logps"], cell["gradients"])
                assert cell["size"] > 0 and worst < LIMIT[dtype], (row, degrees, cell)


@pytest.mark.parametrize("world", DEGREES)
def test_against_one_process(gang, world):
    check(gang, list(ROWS.values()), world)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("window", [1, 4, 11])
def test_sliding_window(gang, world, window):
    settings = {**HEADS, "sliding_window": window}
    rows = [{"lengths": [30, 3, 17], "filling": 5}]
    check(gang, rows, world, "mistral", settings)
    check(gang, rows, world, "mistral", settings, least=2)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_key_value_heads(gang, kv_heads):
    check(gang, [{"lengths": [19, 6], "filling": 0}], 4, settings={**HEADS, "num_key_value_heads": kv_heads})


@pytest.mark.parametrize("settings", [LONG_ROPE, DYNAMIC])
@pytest.mark.parametrize("length", [17, 41])
def test_rotary_frequencies_that_depend_on_the_length(gang, settings, length):
    """Below the length at which they change and above it; no rank but the one with the last token holds so long a
    part."""
    family = "phi3" if settings is LONG_ROPE else "llama"
    check(gang, [{"lengths": [length], "filling": 0}], 4, family, {**HEADS, **settings})


def test_float32(gang):
    check(gang, [{"lengths": [33, 8, 21], "filling": 0}], 4, dtype="float32")
