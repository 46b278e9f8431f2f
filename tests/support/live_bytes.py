"""What a computation needs of memory: the most bytes that torch's CPU allocator has given out at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def peak_bytes(function: Callable[[], Any]) -> int:
    """Beyond what was there before, temporary buffers inside of kernels included.

    From torch's profiler, which sees every block that this thread's allocator gives and takes back: the same number
    each time, and nothing of other processes, of pages that were touched before or of an allocator that keeps what it
    has. Blocks that another thread gives back count as kept: see `messages_apart`.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events: Any = profile.profiler.kineto_results.experimental_event_tree()
    live = peak = 0
    for _, size in sorted(_blocks(events)):
        live += size
        peak = max(peak, live)
    return peak


def _blocks(events: Any) -> Iterator[tuple[int, int]]:
    """(when, bytes given out, negative: taken back) of a tree of events."""
    for event in events:
        if event.name == "[memory]":
            yield event.start_time_ns, event.typed[1].alloc_size
        yield from _blocks(event.children)


def outside(tensor: torch.Tensor) -> torch.Tensor:
    """As large a contiguous tensor in memory that torch's allocator has not given out."""
    held = torch.from_numpy(np.empty(tensor.numel() * tensor.element_size(), dtype=np.uint8))
    return held.view(tensor.dtype).view(tensor.shape)


@contextlib.contextmanager
def messages_apart() -> Iterator[None]:
    """What ranks tell one another goes through memory of its own: gloo's threads hold on to what they were given, and
    it is they who give it back."""
    names = ("all_to_all_single", "all_gather", "batch_isend_irecv")
    real = {name: getattr(dist, name) for name in names}

    def all_to_all_single(out: torch.Tensor, tensor: torch.Tensor, *sizes: Any, **named: Any) -> None:
        got = outside(out)
        real["all_to_all_single"](got, outside(tensor).copy_(tensor), *sizes, **named)
        out.copy_(got)

    def all_gather(parts: list[torch.Tensor], tensor: torch.Tensor, **named: Any) -> None:
        got = [outside(part) for part in parts]
        real["all_gather"](got, outside(tensor).copy_(tensor), **named)
        for part, values in zip(parts, got, strict=True):
            part.copy_(values)

    def batch_isend_irecv(operations: list[dist.P2POp]) -> list[Any]:
        places = [operation.tensor for operation in operations]
        for operation, place in zip(operations, places, strict=True):
            operation.tensor = outside(place).copy_(place) if operation.op is dist.isend else outside(place)
        works = real["batch_isend_irecv"](operations)
        return [_Work(*one) for one in zip(works, operations, places, strict=True)]

    made = {"all_to_all_single": all_to_all_single, "all_gather": all_gather, "batch_isend_irecv": batch_isend_irecv}
    for name, function in made.items():
        setattr(dist, name, function)
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


class _Work:
    def __init__(self, work: Any, operation: dist.P2POp, place: torch.Tensor) -> None:
        self._work, self._operation, self._place = work, operation, place

    def wait(self) -> None:
        self._work.wait()
        if self._operation.op is dist.irecv:
            self._place.copy_(self._operation.tensor)
