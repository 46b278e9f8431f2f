"""The size of gradients, on a CPU too, whatever the size of the tensors."""

from __future__ import annotations

import math

import pytest
import torch

from swift_dist.optim.norm import sum_of_squares


def test_large_and_small_tensors() -> None:
    equal, random = torch.full((3_000_001,), 1e-3), torch.randn(1_001, 2_003).T
    parts = [equal, random, torch.zeros(0), torch.tensor(2.0), torch.ones(7, dtype=torch.bfloat16)]
    wanted = sum(float(part.double().square().sum()) for part in parts)
    assert float(sum_of_squares(parts)) == pytest.approx(wanted, rel=1e-6)
    assert float(sum_of_squares([equal])) == pytest.approx(3.000001, rel=1e-5)


def test_what_is_not_finite_shows() -> None:
    assert math.isnan(float(sum_of_squares([torch.tensor([1.0, math.nan])])))
    assert math.isinf(float(sum_of_squares([torch.tensor([1.0, -math.inf])])))
    assert float(sum_of_squares([])) == 0
