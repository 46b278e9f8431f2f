"""Attention over two sets of keys, merged: equal to attention over all of them, backwards too."""

from __future__ import annotations

import pytest
import torch

from swift_dist.kernels.lse_merge import lse_merge, lse_merge_, reference
from tests.kernels.compare import agree, random


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(3, 5, 8), (37, 16), (1, 1), (0, 4), (2, 20, 24)])
def test_against_the_formula(shape, dtype, backend, device):
    inputs = []
    for seed in (0, 2):
        inputs.append(random(*shape, dtype=dtype, device=device, seed=seed))
        inputs.append(random(*shape[:-1], dtype=dtype, device=device, seed=seed + 1, scale=4.0))
    agree(lambda *tensors: lse_merge(*tensors, backend=backend), reference, inputs)


def test_half_precision_parts_are_summed_in_float32(backend, device):
    shape = (9, 12)
    parts = [random(*shape, dtype=torch.bfloat16, device=device, seed=seed).requires_grad_() for seed in (0, 1)]
    lses = [random(9, dtype=torch.float32, device=device, seed=seed) for seed in (2, 3)]
    out, _ = lse_merge(parts[0], lses[0], parts[1], lses[1], backend=backend)
    assert out.dtype == torch.float32
    expected, _ = reference(parts[0].double(), lses[0].double(), parts[1].double(), lses[1].double())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6)
    out.sum().backward()
    assert parts[0].grad is not None and parts[0].grad.dtype == torch.bfloat16


def test_in_place_on_a_part_of_which_some_has_seen_nothing(device):
    def made(*shape, seed):
        return random(*shape, dtype=torch.float32, device=device, seed=seed)

    whole, normalisers = made(6, 9, 4, seed=0), made(6, 9, seed=1)
    normalisers[:, 5] = -torch.inf
    whole[:, 5] = 0
    piece = made(6, 5, 4, seed=2), made(6, 5, seed=3)
    parts = whole[:, 2:7], normalisers[:, 2:7]
    expected = reference(*(tensor.double() for tensor in (*parts, *piece)))
    before = whole.clone()
    lse_merge_(*parts, *piece)
    torch.testing.assert_close(parts[0].double(), expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(parts[1].double(), expected[1], rtol=0, atol=1e-6)
    assert torch.equal(whole[:, :2], before[:, :2]) and torch.equal(whole[:, 7:], before[:, 7:])


def _attention(query, key, value, seen):
    scores = (query @ key.T).masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - torch.where(torch.isneginf(lse), 0.0, lse)[:, None])
    return weights @ value, lse


def test_attention_in_three_parts(backend, device):
    """Queries that see nothing of a part, and one that sees nothing at all."""
    query, key, value = (random(length, 8, dtype=torch.float64, device=device, seed=length) for length in (6, 9, 9))
    key, value = (random(9, 8, dtype=torch.float64, device=device, seed=seed) for seed in (7, 8))
    seen = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)).to(device) < 0.6
    seen[0, :3], seen[1, 3:], seen[2] = False, False, False
    ours, theirs = ([t.clone().requires_grad_() for t in (query, key, value)] for _ in range(2))
    out, lse = torch.full((6, 8), float("nan"), device=device, dtype=torch.float64), torch.full((6,), float("-inf"))
    lse = lse.to(device, torch.float64)
    for part in (slice(0, 3), slice(3, 5), slice(5, 9)):
        piece = _attention(ours[0], ours[1][part], ours[2][part], seen[:, part])
        out, lse = lse_merge(out, lse, *piece, backend=backend)
    expected, expected_lse = _attention(*theirs, seen)
    assert torch.equal(torch.isneginf(lse), torch.isneginf(expected_lse)) and bool(torch.isneginf(lse)[2])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    factors = random(6, 8, dtype=torch.float64, device=device, seed=5)
    rows = torch.tensor([0, 1, 3, 4, 5], device=device)  # autograd's own gradient of the blind row is nan
    (out * factors)[rows].sum().backward()
    (expected * factors)[rows].sum().backward()
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, right.grad, rtol=0, atol=1e-12)


def test_shapes_that_do_not_fit(device):
    with pytest.raises(ValueError, match="do not fit together"):
        lse_merge(torch.ones(2, 3), torch.ones(3), torch.ones(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match="float32"):
        lse_merge(torch.ones(2, 3), torch.ones(2).bfloat16(), torch.ones(2, 3), torch.ones(2))
