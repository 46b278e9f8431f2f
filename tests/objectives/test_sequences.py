"""Sums over the tokens of sequences keep the digits that a small difference of them is made of."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from swift_dist.objectives._sequences import log_ratios, sequence_sums
from swift_dist.objectives.base import Batch


def test_sums_computed_before_keep_the_digits_of_a_small_difference():
    """In float32, of sums whose difference would be lost in it."""
    logps = -5 - torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    reference = logps - 1e-6 * torch.arange(100_000).remainder(2)
    batch = Batch(
        *(torch.ones(100_000), torch.zeros(100_000, dtype=torch.int64), torch.tensor([100_000]), torch.ones(1)),
        logps=logps,
        reference_sums=reference.double().sum()[None],
    )
    exact = math.fsum(logps.tolist()) - math.fsum(reference.tolist())
    assert float(log_ratios(batch)) == pytest.approx(exact, rel=1e-5)
    assert float(log_ratios(replace(batch, reference_logps=reference, reference_sums=None))) == pytest.approx(exact)
    assert abs(float(logps.sum() - reference.sum()) - exact) > 1e-3


def test_sums_of_long_sequences_keep_their_digits():
    """float32 values whose float32 running sum would be off by far more than a preference margin."""
    generator = torch.Generator().manual_seed(0)
    values = -5 - torch.rand(200_000, generator=generator)
    segments = torch.arange(200_000) % 2
    sums = sequence_sums(values, segments, 3)
    exact = [math.fsum(values[side::2].tolist()) for side in (0, 1)]
    assert sums.tolist() == pytest.approx([*exact, 0.0], rel=1e-7)
    naive = torch.zeros(2).index_add(0, segments, values)
    assert abs(float(naive[0]) - exact[0]) > 0.1
