"""Which weights got gradients in a step.

ZeRO-2 and ZeRO-3 send gradients in buckets while a backward pass makes them: if ranks use different weights (a tower
for images that some rows have none of), their buckets hold gradients of different weights, and these are added to one
another, without an error where the sizes agree.
"""

from __future__ import annotations

import zlib
from functools import partial
from typing import Any

import numpy as np
import torch


class UsedWeights:
    """Counts gradients of each weight that learns, until `digest`.

    Weights that DeepSpeed treats as one (``set_z3_leaf_modules``: layers of experts) are left out: it makes zeros for
    those that were not used.

    Args:
        model: laid out by DeepSpeed already.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        learning = [p for p in model.parameters() if p.requires_grad and not hasattr(p, "ds_z3_leaf_module")]
        self._counts = np.zeros(len(learning), dtype=np.int32)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._count, index))
            for index, parameter in enumerate(learning)
        ]

    def _count(self, index: int, parameter: Any) -> None:
        self._counts[index] += 1

    def digest(self) -> int:
        """16 bits that differ, as good as always, where the counts do; starts counting anew."""
        found = zlib.crc32(self._counts.tobytes()) & 0xFFFF
        self._counts[:] = 0
        return found

    def reset(self) -> None:
        """Start counting anew."""
        self._counts[:] = 0

    def close(self) -> None:
        """Stop counting."""
        for hook in self._hooks:
            hook.remove()
