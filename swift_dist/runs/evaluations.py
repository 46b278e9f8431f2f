"""How evaluations went: which was best, and how many came since. A value; it travels in the checkpoint's metadata."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Evaluations:
    """What came so far.

    Args:
        best_loss, best_step: of the lowest eval_loss; None before the first evaluation.
        without_better: evaluations since.
    """

    best_loss: float | None = None
    best_step: int | None = None
    without_better: int = 0

    def after(self, step: int, loss: float) -> Evaluations:
        """With the evaluation after `step` steps. (A loss that is no number is no better than any.)"""
        if not math.isnan(loss) and (self.best_loss is None or loss < self.best_loss):
            return Evaluations(loss, step, 0)
        return Evaluations(self.best_loss, self.best_step, self.without_better + 1)

    def exhausted(self, patience: int | None) -> bool:
        """Whether `patience` (train.early_stopping_patience) is used up."""
        return patience is not None and self.without_better >= patience

    def why_exhausted(self) -> str:
        """For people."""
        missing = "an eval_loss that is a number"
        if self.best_loss is not None:
            missing = f"an eval_loss below {self.best_loss:.4f}, that of step {self.best_step}"
        return f"{self.without_better} evaluation{'s' * (self.without_better > 1)} without {missing}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any] | None) -> Evaluations:
        return cls(**values) if values else cls()
