"""What a step does with its gradients before they are used: their norm, their clipping, fp16's loss scale."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from swift_dist.optim.norm import sum_of_squares as sum_of_whole


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_of_squares(gradients: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Of this rank's parts, as a float64 scalar on `device`; inf or nan where a gradient is."""
    return sum_of_whole(local(gradient) for gradient in gradients).to(device)


def multiply(gradients: Iterable[torch.Tensor], factor: float) -> None:
    """In place; by 1.0, nothing is done."""
    parts = [local(gradient) for gradient in gradients]
    if parts and factor != 1.0:
        torch._foreach_mul_(parts, factor)


def clip_factor(norm: float, limit: float) -> float:
    """What brings gradients of this norm to at most `limit` (0: no limit), as ``clip_grad_norm_`` does."""
    return min(1.0, limit / (norm + 1e-6)) if limit else 1.0


class LossScale:
    """fp16's dynamic loss scale, by the rule of ``torch.amp.GradScaler``: half of it after an overflow, twice as much
    after 2000 steps without one (Micikevicius et al., arXiv 1710.03740). It never falls below 1.

    Args:
        first: the scale of the first step.
    """

    INTERVAL = 2000

    def __init__(self, first: float) -> None:
        self.value, self.good_steps = float(first), 0

    def after_overflow(self) -> None:
        self.value, self.good_steps = max(self.value / 2, 1.0), 0

    def after_update(self) -> None:
        self.good_steps += 1
        if self.good_steps == self.INTERVAL:
            self.value, self.good_steps = self.value * 2, 0

    def state(self) -> dict[str, Any]:
        return {"scale": self.value, "good_steps": self.good_steps}

    def load(self, state: dict[str, Any]) -> None:
        self.value, self.good_steps = float(state["scale"]), int(state["good_steps"])
