"""Sums of gradients over ranks that hold the same weights, while the backward pass still makes others.

The bucketed, overlapping all-reduce of torch's DistributedDataParallel (Li et al., arXiv 2006.15704), without what
stands in the way here: its set of weights is fixed when it is made (LISA's changes), a weight that a rank did not use
is an error or costs a walk through the graph, and it takes means. It also holds the group in C++, where a rank that
leaves after a peer's death cannot let go of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

BUCKET_BYTES = 25 << 20
"""DistributedDataParallel's."""


class Reducer:
    """Call `reducing` around the last micro-batch of a step.

    Every rank must have the same weights learn. Which of them it uses is its own matter: each bucket carries a flag for
    each of its weights, and one that no rank used has no gradient afterwards, as in one process.

    Args:
        weights: those that may learn, in the model's order, of one dtype and device.
        group: of the ranks; None: all.
    """

    def __init__(self, weights: Iterable[torch.Tensor], group: dist.ProcessGroup | None) -> None:
        self._weights, self._group = list(weights), group
        self._buckets: list[list[torch.Tensor]] = []
        self._bucket_of: dict[torch.Tensor, int] = {}
        self._hooks: list[Any] = []
        self._is_active = False
        self._waiting: list[set[torch.Tensor]] = []
        self._launched: list[tuple[torch.Tensor, list[bool], Any]] = []

    @contextlib.contextmanager
    def reducing(self) -> Iterator[None]:
        """A bucket is on its way as soon as its weights and those of the buckets before it have their gradients."""
        self._lay_out()
        self._waiting, self._launched = [set(bucket) for bucket in self._buckets], []
        self._is_active = True
        try:
            yield
        finally:
            self._is_active = False
        while len(self._launched) < len(self._buckets):
            self._launch()
        for bucket, (flat, used, work) in zip(self._buckets, self._launched, strict=True):
            work.wait()
            self._give_back(bucket, flat, used)
        self._launched = []

    def _lay_out(self) -> None:
        """Buckets of what learns now, last weights first: about the order in which a backward pass has them."""
        learning = [weight for weight in reversed(self._weights) if weight.requires_grad]
        if [id(weight) for bucket in self._buckets for weight in bucket] == [id(weight) for weight in learning]:
            return
        self.close()
        size = BUCKET_BYTES
        for weight in learning:
            if size >= BUCKET_BYTES:
                self._buckets.append([])
                size = 0
            self._buckets[-1].append(weight)
            size += weight.numel() * weight.element_size()
            self._bucket_of[weight] = len(self._buckets) - 1
            self._hooks.append(weight.register_post_accumulate_grad_hook(self._has_gradient))

    def _has_gradient(self, weight: torch.Tensor) -> None:
        if not self._is_active:
            return
        number = self._bucket_of[weight]
        assert number >= len(self._launched), "a weight had a second gradient after its sum was under way"
        self._waiting[number].discard(weight)
        while len(self._launched) < len(self._buckets) and not self._waiting[len(self._launched)]:
            self._launch()

    @torch.no_grad()
    def _launch(self) -> None:
        bucket = self._buckets[len(self._launched)]
        used = [weight.grad is not None for weight in bucket]
        parts = [
            weight.new_zeros(weight.numel()) if weight.grad is None else weight.grad.flatten() for weight in bucket
        ]
        flat = torch.cat([*parts, torch.tensor(used, dtype=parts[0].dtype, device=parts[0].device)])
        for weight in bucket:
            weight.grad = None  # `flat` has it
        work = dist.all_reduce(flat, group=self._group, async_op=True)
        self._launched.append((flat, used, work))

    def _give_back(self, bucket: list[torch.Tensor], flat: torch.Tensor, used: list[bool]) -> None:
        sums = flat.split([*(weight.numel() for weight in bucket), len(bucket)])
        by_any = used if all(used) else (sums[-1] > 0).tolist()
        for weight, part, is_used in zip(bucket, sums, by_any, strict=False):
            weight.grad = part.view_as(weight) if is_used else None

    def close(self) -> None:
        """Forget the weights' order; hooks are removed."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._buckets, self._bucket_of, self._launched = [], [], {}, []
