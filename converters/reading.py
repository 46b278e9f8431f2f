"""Reading boxes of stored tensors by numpy: files are mapped into memory, and only what is asked for is touched."""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from swift_dist.converters.mapping import Box, box_shape, box_size, slices
from swift_dist.converters.stored import Extent, ExtentIndex, StoredTensor, numpy_dtype
from swift_dist.converters.torch_files import find_archived
from swift_dist.errors import RunError

_OPEN_FILES = 64
_KNOWN_PLACES = 4096
Array = np.ndarray[Any, Any]


class Reader:
    """Boxes of stored tensors as arrays. Not for several threads."""

    def __init__(self) -> None:
        self._maps: OrderedDict[str, mmap.mmap] = OrderedDict()
        self._places: OrderedDict[tuple[str, int], int] = OrderedDict()

    def read(self, stored: StoredTensor, box: Box | None = None) -> Array:
        """The values of a box in the tensor's `values_dtype`; a view of the mapped file where that is possible.

        Raises:
            RunError: a file is missing or short, or does not hold what its index says.
        """
        box = stored.whole if box is None else box
        values = self._stored_values(stored, box)
        return values if stored.scale is None else self._dequantised(stored, box, values)

    def extent(self, stored: StoredTensor, extent: Extent) -> Array:
        """All stored values of one extent: a view of the mapped file."""
        mapped = self._map(extent.file)
        dtype = numpy_dtype(stored.dtype)
        offset, count = self._place(stored, extent), box_size(extent.box)
        if offset + count * dtype.itemsize > len(mapped):
            raise _damaged(extent.file, f"{stored.name} would end at byte {offset + count * dtype.itemsize}")
        return np.frombuffer(mapped, dtype, count, offset).reshape(box_shape(extent.box))

    def close(self) -> None:
        self._maps.clear()  # closed when the last view of them is gone

    def _stored_values(self, stored: StoredTensor, box: Box) -> Array:
        parts = ExtentIndex(stored.extents).overlapping(box)
        if len(parts) == 1 and parts[0][1] == box:
            extent = parts[0][0]
            return self.extent(stored, extent)[slices(_within(box, extent.box))]
        whole = np.empty(box_shape(box), numpy_dtype(stored.dtype))
        filled = 0
        for extent, shared in parts:
            part = self.extent(stored, extent)[slices(_within(shared, extent.box))]
            whole[slices(_within(shared, box))] = part
            filled += part.size
        if filled != whole.size:
            raise RunError(f"{stored.name}: its parts in the files do not make up the tensor", "use another copy of it")
        return whole

    def _dequantised(self, stored: StoredTensor, box: Box, values: Array) -> Array:
        """Values times their blocks' factors, computed in fp32 (DeepSeek-V3's inference/kernel.py, weight_dequant).

        What `kernels/block_fp8.py` computes of whole matrices, which tests compare with this: here of any box, and in
        numpy, since workers do without torch.
        """
        assert stored.scale is not None
        rows, columns = (
            np.arange(start, stop) // size for (start, stop), size in zip(box[-2:], stored.block, strict=True)
        )
        needed = ((int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1))
        factors = self.read(stored.scale, needed).astype(np.float32)
        spread = factors[np.ix_(rows - rows[0], columns - columns[0])]
        return (values.astype(np.float32) * spread).astype(numpy_dtype("BF16"))

    def _place(self, stored: StoredTensor, extent: Extent) -> int:
        """Byte of the file at which an extent's values begin."""
        if not extent.archive:
            return extent.offset
        key = (extent.file, extent.offset)
        if key not in self._places:
            shape = box_shape(extent.box)
            try:
                place = find_archived(self._map(extent.file), extent.offset, extent.archive, shape, stored.dtype)
            except ValueError as error:
                raise _damaged(extent.file, f"{stored.name}: {error}") from None
            self._places[key] = place
            if len(self._places) > _KNOWN_PLACES:
                self._places.popitem(last=False)
        return self._places[key]

    def _map(self, file: str) -> mmap.mmap:
        found = self._maps.get(file)
        if found is None:
            try:
                with Path(file).open("rb") as stream:
                    if os.fstat(stream.fileno()).st_size == 0:
                        raise _damaged(file, "it is empty")
                    found = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise RunError(f"cannot read {file}: {error.strerror}", "restore the file and repeat") from None
            self._maps[file] = found
            if len(self._maps) > _OPEN_FILES:
                self._maps.popitem(last=False)
        self._maps.move_to_end(file)
        return found


def as_torch(values: Array) -> Any:
    """The values as a torch tensor of the same dtype; a copy, since files are mapped read-only."""
    import torch

    name = values.dtype.name
    if name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}").copy()
        return torch.from_numpy(bits).view(getattr(torch, name))
    return torch.from_numpy(np.array(values))


def _within(box: Box, outer: Box) -> Box:
    return tuple((start - first, stop - first) for (start, stop), (first, _) in zip(box, outer, strict=True))


def _damaged(file: str, problem: str) -> RunError:
    return RunError(f"{file} is damaged: {problem}", "get the file again and repeat the command")
