"""Which parameters weight decay applies to. Shared by both engines."""

from __future__ import annotations

from collections.abc import Sequence


def decays(name: str, shape: Sequence[int], *, decay_norm_and_bias: bool) -> bool:
    """Whether weight decay shrinks this parameter: matrices yes, norm weights and biases only where asked for.

    The rule of transformers and of megatron: what has one dimension (norms, biases) has a scale or an offset of its
    own that shrinking would fight. The factors of (IA)^3 begin at 1 and are such scales, too, though PEFT holds them as
    matrices of one row or column.
    """
    is_matrix = len(shape) > 1 and "ia3_l" not in name.split(".")
    return decay_norm_and_bias or (is_matrix and not name.endswith(".bias"))
