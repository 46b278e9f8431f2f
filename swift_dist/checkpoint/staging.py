"""Private copies of a rank's shards: what is written is the state at the call, whatever training does next.

All shards of a rank go into one buffer ("arena") that is kept for the next save. On a GPU rank the arena is pinned, so
the copy runs at the speed of the bus, once, before the call returns.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch

logger = logging.getLogger(__name__)

_ALIGNMENT = 64  # bytes; enough for every dtype, and a cache line


class StagingArena:
    """One reusable host buffer that holds copies of many tensors."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    def stage(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy `tensors` (any device, any strides) into the arena.

        Returns:
            contiguous CPU tensors of the same shapes and dtypes, each with a storage of exactly its own size
            (``torch.save`` writes whole storages). They are valid until the next call.

        Raises:
            RuntimeError: where the host memory does not suffice (torch's own error).
        """
        begun = time.monotonic()
        starts, size = _place(tensors)
        buffer = self._reserve(size, pinned=any(tensor.is_cuda for tensor in tensors))
        memory = memoryview(buffer.numpy())  # type: ignore[arg-type]  # an ndarray is a buffer
        copies = []
        for tensor, start in zip(tensors, starts, strict=True):
            if tensor.numel() == 0:
                copies.append(torch.empty(tensor.shape, dtype=tensor.dtype))
                continue
            target = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            target.copy_(tensor.detach(), non_blocking=True)
            copies.append(
                torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
            )
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        logger.debug("staged %d tensors, %d bytes, in %.3f s", len(tensors), size, time.monotonic() - begun)
        return copies

    def _reserve(self, size: int, pinned: bool) -> torch.Tensor:
        if self._buffer is None or self._buffer.numel() < size or (pinned and not self._buffer.is_pinned()):
            self._buffer = None  # give the old one back first
            self._buffer = torch.empty(max(size, 1), dtype=torch.uint8, pin_memory=pinned)
        return self._buffer


def _place(tensors: Sequence[torch.Tensor]) -> tuple[list[int], int]:
    """(start of each tensor in the arena, arena size), in bytes."""
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return starts, end
