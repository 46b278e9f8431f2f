"""A kernel's results and gradients beside its reference's in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Largest difference by largest value. fp64: the formula; the others: the rounding of their own dtype."""


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    assert torch.isfinite(found.double()).all()
    if not found.numel():
        return 0.0
    found, expected = found.detach(), expected.detach()
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))


def agree(
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    limit: float | None = None,
) -> None:
    """Compare every result, and every gradient of a random weighting of them. The reference gets the inputs' values in
    fp64."""
    if limit is None:
        limit = TOLERANCES[inputs[0].dtype]
    ours = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    theirs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found, expected = _tuple(kernel(*ours)), _tuple(reference(*theirs))
    assert len(found) == len(expected)
    total, wanted = 0.0, 0.0
    for index, (mine, right) in enumerate(zip(found, expected, strict=True)):
        assert difference(mine, right) <= limit, f"result {index}: {difference(mine, right)}"
        factors = random(*right.shape, dtype=torch.float64, device=right.device, seed=100 + index)
        total = total + (mine * factors.to(mine.dtype)).sum()
        wanted = wanted + (right * factors.to(mine.dtype).double()).sum()
    total.backward()
    wanted.backward()
    for index, (mine, right) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.grad is not None and mine.grad.dtype == mine.dtype
        assert difference(mine.grad, right.grad) <= limit, f"gradient {index}: {difference(mine.grad, right.grad)}"


def equal_but_for_rounding(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal on a GPU. Triton's interpreter cuts float32 where a GPU rounds it, so there the
    next two numbers are let pass."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    if found.is_cuda:
        return torch.equal(found.float(), expected.float())
    step = torch.finfo(found.dtype).eps * expected.float().abs()
    return bool(((found.float() - expected.float()).abs() <= 2 * step).all())


def _tuple(results: Any) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)
