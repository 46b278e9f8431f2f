"""Shared rows: a model's log-probabilities and every weight's gradient, beside one process."""

from __future__ import annotations

from pathlib import Path

import pytest

FILE = Path(__file__).with_name("shared_row_ranks.py")
DEGREES = [(2, 1), (1, 2), (1, 3), (2, 2), (4, 1), (1, 4)]
ROWS = {"one": [37], "packed": [9, 1, 22, 5, 1], "short": [2], "many": [1] * 9}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def check(gang, lengths, degrees, family="llama", settings=None, dtype="float64"):
    world = degrees[0] * degrees[1]
    arguments = {"lengths": lengths, "ulysses": degrees[0], "ring": degrees[1]}
    results = gang.run(FILE, "compare", world, **arguments, family=family, settings=settings or HEADS, dtype=dtype)
    limit = {"float64": 1e-11, "float32": 1e-5}[dtype]
    for found in results:
        assert found["logps"] < limit and found["gradients"] < limit, found
    assert any(found["size"] > 0 for found in results)


@pytest.mark.parametrize("degrees", DEGREES)
@pytest.mark.parametrize("row", ROWS)
def test_against_one_process(gang, degrees, row):
    check(gang, ROWS[row], degrees)


@pytest.mark.parametrize("degrees", [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("window", [1, 4, 11])
def test_sliding_window(gang, degrees, window):
    settings = {**HEADS, "sliding_window": window}
    check(gang, [30, 3, 17], degrees, "mistral", settings)


@pytest.mark.parametrize("degrees", [(4, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_key_value_heads(gang, degrees, kv_heads):
    check(gang, [19, 6], degrees, settings={**HEADS, "num_key_value_heads": kv_heads})


@pytest.mark.parametrize("degrees", [(2, 2), (1, 3)])
def test_float32(gang, degrees):
    check(gang, [33, 8, 21], degrees, dtype="float32")
