"""What a template makes of a conversation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Encoded:
    """A sequence of tokens.

    Args:
        ids: int32 [n].
        weights: float32 [n], the weight in the loss of predicting ``ids[t]`` from what stands before it: 0 for what the
            model is given, 1 (or a loss scale) for what the assistant would generate. ``weights[0]`` is 0.
    """

    ids: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)
