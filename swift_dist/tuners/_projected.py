"""The optimizer of GaLore (arXiv 2403.03507), around any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from swift_dist.errors import JobError
from swift_dist.tuners._patterns import matches
from swift_dist.tuners.galore import Options

Groups = list[dict[str, Any]]


class ProjectedOptimizer(torch.optim.Optimizer):
    """Updates matrices by what another optimizer makes of their projected gradients.

    With G [m, n] the gradient and P the `rank` leading singular vectors of one computed every `interval` updates:

        R = P' G   (left: P [m, r], R [r, n])    or    R = G P   (right: P [n, r], R [m, r])
        W <- (1 - lr * weight_decay) W + scale * P U   (right: U P'),

    where U is the step of the inner optimizer on R: -lr M / (sqrt V + eps) of AdamW, whose M and V have R's shape. The
    inner optimizer owns a tensor of R's shape for each matrix, which is 0 before each step and U after it, so it can be
    any. Weights that are not projected are its own as they are.

    ``state[weight]`` has the inner optimizer's entries for it, and ``projection`` (P) of projected ones: all that a
    checkpoint needs.

    Args:
        groups: parameter groups with ``params`` and their ``names``.
        make: makes the inner optimizer of such groups.
        options: of the tuner.

    Raises:
        JobError: no weight is projected.
    """

    def __init__(self, groups: Groups, make: Callable[[Groups], torch.optim.Optimizer], options: Options) -> None:
        self.options = options
        self._inner_of: dict[torch.Tensor, torch.Tensor] = {}  # weight -> the inner optimizer's tensor
        inner_groups = [inner for group in groups for inner in self._divided(group)]
        if not any(weight is not inner for weight, inner in self._inner_of.items()):
            raise JobError(
                "tuner.galore.rank",
                f"no matrix matches {list(options.targets)} and has more than {options.rank} rows and columns",
                "lower tuner.galore.rank, or change tuner.galore.targets",
            )
        self.inner = make(inner_groups)
        super().__init__([dict(group) for group in groups], dict(self.inner.defaults))

    def _divided(self, group: dict[str, Any]) -> Groups:
        """A group of the inner optimizer for what it updates itself, and one for what is projected."""
        own, projected = [], []
        for name, weight in zip(group["names"], group["params"], strict=True):
            if self._is_projected(name, weight):
                inner = torch.zeros(self._low_shape(weight), dtype=weight.dtype, device=weight.device)
                self._inner_of[weight] = inner.requires_grad_(True)
                projected.append((name, inner))
            else:
                self._inner_of[weight] = weight
                own.append((name, weight))
        rest = {key: value for key, value in group.items() if key not in ("params", "names")}
        # decay is of the weight, not of its update
        parts = [(own, rest), (projected, {**rest, "weight_decay": 0.0})]
        self._parts = [*getattr(self, "_parts", []), [bool(members) for members, _ in parts]]
        return [
            {**settings, "params": [p for _, p in members], "names": [n for n, _ in members]}
            for members, settings in parts
            if members
        ]

    def _is_projected(self, name: str, weight: torch.Tensor) -> bool:
        is_target = any(matches(name, pattern) for pattern in self.options.targets)
        return is_target and weight.ndim == 2 and min(weight.shape) > self.options.rank

    def _is_left(self, weight: torch.Tensor) -> bool:
        """Whether P multiplies from the left. Of a square matrix the right side counts as the shorter, as in the
        paper's code."""
        left_is_shorter = weight.shape[0] < weight.shape[1]
        return {"short": left_is_shorter, "long": not left_is_shorter, "left": True, "right": False}[self.options.side]

    def _low_shape(self, weight: torch.Tensor) -> tuple[int, int]:
        rows, columns = weight.shape
        return (self.options.rank, columns) if self._is_left(weight) else (rows, self.options.rank)

    def _projection(self, gradient: torch.Tensor, is_left: bool) -> torch.Tensor:
        u, _, vh = torch.linalg.svd(gradient.float(), full_matrices=False)
        p = u[:, : self.options.rank] if is_left else vh[: self.options.rank].T
        return p.to(gradient.dtype).contiguous()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update. `closure`, where there is one, computes loss and gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._pass_settings_on()
        projected = [(w, low) for w, low in self._inner_of.items() if low is not w]
        for weight, low in self._inner_of.items():
            self._pass_state_on(weight, low)
        for weight, low in projected:
            low.zero_()
            low.grad = self._projected(weight)
        self.inner.step()
        for group in self.param_groups:
            for weight in group["params"]:
                low = self._inner_of[weight]
                if low is not weight and low.grad is not None:
                    weight.mul_(1 - group["lr"] * group.get("weight_decay", 0.0))
                    p = self.state[weight]["projection"]
                    update = p @ low if self._is_left(weight) else low @ p.T
                    weight.add_(update, alpha=self.options.scale)
                self._take_state_back(weight, low)
        return loss

    def _projected(self, weight: torch.Tensor) -> torch.Tensor | None:
        """R of a weight's gradient; None where it has none."""
        if weight.grad is None:
            return None
        state = self.state[weight]
        updates = int(state.get("updates", 0))
        if "projection" not in state or updates % self.options.interval == 0:
            state["projection"] = self._projection(weight.grad, self._is_left(weight))
        state["updates"] = torch.tensor(float(updates + 1))
        p = state["projection"]
        return p.T @ weight.grad if self._is_left(weight) else weight.grad @ p

    def _pass_settings_on(self) -> None:
        """Learning rate and the like of our groups, which schedules set, to the inner optimizer's."""
        inner = iter(self.inner.param_groups)
        for group, (has_own, has_projected) in zip(self.param_groups, self._parts, strict=True):
            settings = {key: value for key, value in group.items() if key not in ("params", "names")}
            if has_own:
                next(inner).update(settings)
            if has_projected:
                next(inner).update({**settings, "weight_decay": 0.0})

    def _pass_state_on(self, weight: torch.Tensor, low: torch.Tensor) -> None:
        """Our state, which a checkpoint may have set or taken away, is the truth."""
        held = {k: v for k, v in self.state.get(weight, {}).items() if k not in ("projection", "updates")}
        if held:
            self.inner.state[low] = held
        else:
            self.inner.state.pop(low, None)

    def _take_state_back(self, weight: torch.Tensor, low: torch.Tensor) -> None:
        if self.inner.state.get(low):
            self.state[weight].update(self.inner.state[low])
