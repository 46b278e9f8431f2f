"""Block-wise FP8 there and back."""

from __future__ import annotations

import pytest
import torch

from swift_dist.kernels import block_fp8
from tests.kernels.compare import equal_but_for_rounding, random

SHAPES = [(128, 256), (130, 70), (1, 1), (7, 300)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [(128, 128), (16, 64), (24, 40)])
def test_quantise(shape, dtype, block, backend, device):
    weight = random(*shape, dtype=dtype, device=device)
    weight[:1] *= 30  # blocks of differing size
    quantised, factors = block_fp8.quantise(weight, block, backend=backend)
    expected, right = block_fp8.quantise_reference(weight, block)
    assert torch.equal(factors, right) and quantised.dtype == torch.float8_e4m3fn
    assert torch.equal(quantised.float(), expected.float())
    # e4m3 has 3 bits after the point: half a step is 1/16 of a number, or, of the smallest, 2^-10 of the factor
    wide = right.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]
    back = block_fp8.dequantise(quantised, factors, block, torch.float32, backend=backend)
    limit = torch.maximum(weight.float().abs() / 16, wide * 2.0**-10) * (1 + 1e-6)
    assert bool(((back - weight.float()).abs() <= limit).all())
    assert float((back - weight.float()).abs().max()) > 0 or shape == (1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantise(dtype, backend, device):
    quantised = random(40, 100, dtype=torch.float32, device=device, scale=50).to(torch.float8_e4m3fn)
    factors = random(3, 4, dtype=torch.float32, device=device, seed=1).abs()
    found = block_fp8.dequantise(quantised, factors, (16, 32), dtype, backend=backend)
    expected = torch.empty(40, 100, dtype=torch.float32, device=device)
    for row in range(40):
        for column in range(0, 100, 32):
            part = slice(column, column + 32)
            expected[row, part] = quantised[row, part].float() * factors[row // 16, column // 32]
    assert equal_but_for_rounding(found, expected.to(dtype))


def test_zeros_and_the_largest(backend, device):
    weight = torch.zeros(8, 8, device=device)
    weight[4:, 4:] = torch.finfo(torch.float32).max
    quantised, factors = block_fp8.quantise(weight, (4, 4), backend=backend)
    assert factors[0, 0] == 1 and torch.equal(quantised[4:, 4:].float(), torch.full((4, 4), 448.0, device=device))
    torch.testing.assert_close(block_fp8.dequantise(quantised, factors, (4, 4), torch.float32, backend=backend), weight)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_cannot_be_stored_is_refused(wrong, device):
    weight = torch.ones(4, 4, device=device)
    weight[1, 2] = wrong
    with pytest.raises(ValueError, match="nan or infinities"):
        block_fp8.quantise(weight)
    with pytest.raises(ValueError, match="factors"):
        block_fp8.dequantise(torch.ones(4, 4).to(torch.float8_e4m3fn), torch.ones(2, 2))
    with pytest.raises(ValueError, match="e4m3fn"):
        block_fp8.dequantise(torch.ones(4, 4).to(torch.float8_e5m2), torch.ones(1, 1))
