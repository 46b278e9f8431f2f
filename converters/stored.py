"""Tensors as they lie in files: which bytes of which file hold which part. No torch, no values read.

Every format describes what it holds, and what it is going to hold, as `StoredTensor`s. A plan of copies between any two
formats follows from these and from the rows of `mapping`.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from swift_dist.converters.mapping import Box, box_size

ITEM_SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes of one element, by dtype. dtypes go by safetensors' names everywhere in this room."""

FLOATS = ("F64", "F32", "F16", "BF16")
BY_OPTION = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
OPTION_OF = {name: option for option, name in BY_OPTION.items()}
BY_TORCH = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
}
"""Our name of each torch dtype, by torch's."""
TO_TORCH = {ours: torchs for torchs, ours in BY_TORCH.items()}


def numpy_dtype(name: str) -> Any:
    """numpy's dtype; those that numpy lacks come from ml_dtypes."""
    return _numpy_dtypes()[name]


@cache
def _numpy_dtypes() -> dict[str, Any]:
    import ml_dtypes
    import numpy as np

    special = {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
    return {ours: np.dtype(special.get(ours, torchs)) for torchs, ours in BY_TORCH.items()}


@dataclass(frozen=True, slots=True)
class Extent:
    """A part of a tensor that lies in one file in one piece, row-major.

    Args:
        file: path; for what is going to be written: relative to the target folder.
        offset: its first byte.
        box: which part of the tensor.
        archive: bytes from `offset` on that are an archive of torch.save with this part in it; 0: the plain values.
            Where in the archive the values lie is found when they are read.
    """

    file: str
    offset: int
    box: Box
    archive: int = 0


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor and where its parts lie.

    Args:
        scale: of block-quantised weights: the tensor of factors, one for each block of `block` elements. Then `dtype`
            is that of the quantised values, and what is read is their product (`values_dtype`).
        block: rows and columns of a block.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    extents: tuple[Extent, ...] = ()
    scale: StoredTensor | None = None
    block: tuple[int, int] = (0, 0)

    @property
    def num_elements(self) -> int:
        return box_size(self.whole)

    @property
    def num_bytes(self) -> int:
        """Of the stored values, without factors."""
        return self.num_elements * ITEM_SIZES[self.dtype]

    @property
    def values_dtype(self) -> str:
        """The dtype in which values are handed out: block-quantised ones as bf16, what they were trained in."""
        return "BF16" if self.scale is not None else self.dtype

    @property
    def whole(self) -> Box:
        return tuple((0, extent) for extent in self.shape)


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key for names: numbers in them by value."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def overlap(a: Box, b: Box) -> Box | None:
    """What two boxes share; None: nothing."""
    found = []
    for (a_start, a_stop), (b_start, b_stop) in zip(a, b, strict=True):
        start, stop = max(a_start, b_start), min(a_stop, b_stop)
        if start >= stop:
            return None
        found.append((start, stop))
    return tuple(found)


def moved(box: Box, origin: Box, target: Box) -> Box:
    """The box that lies in `target` as `box` lies in `origin`.

    The two may differ in leading dimensions of extent 1 (the number of an expert, of a layer).
    """
    shared = min(len(origin), len(target))
    lead = len(target) - shared
    own = len(origin) - shared
    tail = tuple(
        (start - o + t, stop - o + t)
        for (start, stop), (o, _), (t, _) in zip(box[own:], origin[own:], target[lead:], strict=True)
    )
    return (*target[:lead], *tail)


class ExtentIndex:
    """Finds the extents of a tensor that overlap a box: a tensor of experts has hundreds, and each is asked for."""

    def __init__(self, extents: Iterable[Extent]) -> None:
        self._extents = sorted(extents, key=lambda extent: extent.box)
        self._starts = [extent.box[0][0] if extent.box else 0 for extent in self._extents]
        self._longest = max((e.box[0][1] - e.box[0][0] for e in self._extents if e.box), default=1)

    def overlapping(self, box: Box) -> list[tuple[Extent, Box]]:
        """(extent, shared box) in the order of boxes."""
        if not box:
            return [(extent, ()) for extent in self._extents]
        first = bisect_left(self._starts, box[0][0] - self._longest + 1)
        last = bisect_left(self._starts, box[0][1])
        found = ((extent, overlap(extent.box, box)) for extent in self._extents[first:last])
        return [(extent, shared) for extent, shared in found if shared is not None]


def covers(extents: Iterable[Extent], shape: tuple[int, ...]) -> bool:
    """Whether the extents make up a tensor exactly: as many elements, and no two overlap."""
    extents = tuple(extents)
    if sum(box_size(extent.box) for extent in extents) != box_size(tuple((0, extent) for extent in shape)):
        return False
    if any(stop > bound for extent in extents for (_, stop), bound in zip(extent.box, shape, strict=True)):
        return False
    index = ExtentIndex(extents)
    return all(len(index.overlapping(extent.box)) == 1 for extent in extents if box_size(extent.box))
