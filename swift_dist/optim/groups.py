"""Which parameters weight decay applies to. Shared by both engines."""

from __future__ import annotations

from collections.abc import Sequence


def decays(name: str, shape: Sequence[int], *, decay_norm_and_bias: bool) -> bool:
    """Whether weight decay shrinks this parameter: matrices yes, norm weights and biases only where asked for.

    The rule of transformers and of megatron: what has one dimension (norms, biases) has a scale or an offset of its
    own that shrinking would fight.
    """
    return decay_norm_and_bias or (len(shape) > 1 and not name.endswith(".bias"))
