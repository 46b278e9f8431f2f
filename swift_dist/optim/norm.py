"""The size of gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_PIECE = 1 << 14
"""Numbers whose squares are added up in float32 at a time on a CPU, which adds them one after the other: of 20 million
equal numbers torch's norm is 1.2 % too small, of 20 million random ones 0.1 %."""


def sum_of_squares(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Of all numbers of some tensors of one device: a float64 scalar there (of none on the CPU); inf or nan where one
    is."""
    import torch

    pieces = [piece for part in parts for piece in _pieces(part.detach())]
    if not pieces:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(torch._foreach_norm(pieces, 2, dtype=torch.float32)).double().square().sum()


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    if not tensor.numel():
        return
    yield from (tensor,) if tensor.is_cuda else tensor.reshape(-1).split(_PIECE)
