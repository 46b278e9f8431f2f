"""A flat range of a tensor as boxes of it. A range of its row-major numbers is what optimizers that shard own; a box is
what a checkpoint stores."""

from __future__ import annotations

import math
from collections.abc import Iterator

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offset, size) in each dimension."""


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The boxes that make up the flat range [start, stop) of a row-major array, in order.

    They are at most 2 * dims - 1; of a scalar one.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())  # a scalar is one box
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows are first .. last - 1
    if first > last:  # the range lies within one row and touches neither end
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    yield from _in_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[Box]:
    if start < math.prod(shape[1:]):
        for offset, size in boxes(shape[1:], start, stop):
            yield (index, *offset), (1, *size)
