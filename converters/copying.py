"""The work itself, in worker processes: regions of files are filled, or compared, slab by slab.

A slab is a few MiB of rows of one region. It is gathered from the mapped sources, hashed, looked through for NaN and
infinity, and written (or compared), so that memory does not grow with the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from swift_dist.converters.mapping import Box, box_shape, box_size, slices
from swift_dist.converters.plan import Copy, Delta, Region, promoted
from swift_dist.converters.reading import Array, Reader
from swift_dist.converters.stored import StoredTensor, moved, numpy_dtype, overlap
from swift_dist.errors import RunError

_SLAB_BYTES = 4 << 20
_TILE = (128, 2048)


@dataclass(frozen=True)
class Unit:
    """What a worker does at a time: a part of one file, in the order of its bytes.

    Args:
        id: (file's number, part of the file).
        literals: (offset, bytes) that are known beforehand: headers, and what stands between tensors.
        sources: stored tensors to hash; each is in one unit of the whole plan.
        num_bytes: of the regions.
    """

    id: tuple[int, int]
    regions: tuple[Region, ...]
    literals: tuple[tuple[int, bytes], ...] = ()
    sources: tuple[StoredTensor, ...] = ()
    num_bytes: int = 0


@dataclass
class Difference:
    """What is different between two tensors.

    Args:
        count: values that differ; largest: the largest difference of two of them.
        dtypes: where the two are of different dtypes, which.
    """

    count: int = 0
    largest: float = 0.0
    dtypes: str = ""

    def __bool__(self) -> bool:
        return bool(self.count or self.dtypes)

    def __str__(self) -> str:
        return self.dtypes or f"{self.count} values differ, by up to {self.largest:.3g}"

    def add(self, other: Difference) -> None:
        self.count += other.count
        self.largest = max(self.largest, other.largest)
        self.dtypes = self.dtypes or other.dtypes


@dataclass
class Facts:
    """What a worker has seen of a unit.

    Args:
        hashes: by target tensor: (box, xxh3-128 of its bytes) for each region.
        source_hashes: by source tensor: of each extent, in the order of extents.
        non_finite: by target tensor: number of NaN and infinite values, where there are any.
        differences: when comparing, by tensor: what is different.
    """

    id: tuple[int, int]
    num_bytes: int
    hashes: dict[str, list[tuple[Box, str]]] = field(default_factory=dict)
    source_hashes: dict[str, list[str]] = field(default_factory=dict)
    non_finite: dict[str, int] = field(default_factory=dict)
    differences: dict[str, Difference] = field(default_factory=dict)


@dataclass(frozen=True)
class Fill:
    """Task of a worker: write units into the files of a folder. The files exist with their final size.

    Args:
        create: make the files: a unit is a whole file then (workers on several nodes).
        strict: NaN or infinity in a source ends the work.
    """

    folder: str
    files: tuple[tuple[str, int], ...] = ()
    create: bool = False
    strict: bool = False

    def start(self) -> Any:
        return _Filler(self)


class _Filler:
    def __init__(self, task: Fill) -> None:
        self._task, self._reader = task, Reader()

    def __call__(self, unit: Unit) -> Facts:
        facts = Facts(unit.id, unit.num_bytes)
        file, size = self._task.files[unit.id[0]]
        path = Path(self._task.folder) / file
        descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if self._task.create else 0), 0o644)
        try:
            if self._task.create:
                os.truncate(descriptor, size)
            for offset, content in unit.literals:
                _write(descriptor, memoryview(content), offset)
            for region in unit.regions:
                self._fill(descriptor, region, facts)
            _hash_sources(unit.sources, self._reader, facts)
            if self._task.create:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return facts

    def _fill(self, descriptor: int, region: Region, facts: Facts) -> None:
        name = region.stored.name
        digest, offset, bad = xxhash.xxh3_128(), region.stored.extents[0].offset, 0
        for part, slab in gathered(region.copies, region.box, region.stored.dtype, self._reader):
            found = count_non_finite(slab)
            if found and slab.dtype == np.float16:
                _refuse_overflow(region, part, self._reader)
            bad += found
            data = _bytes_of(slab)
            digest.update(data)
            _write(descriptor, data, offset)
            offset += len(data)
        if bad:
            if self._task.strict:
                raise RunError(f"{name}: {bad} values are NaN or infinite", "use another source, or leave out --strict")
            facts.non_finite[name] = facts.non_finite.get(name, 0) + bad
        facts.hashes.setdefault(name, []).append((region.box, digest.hexdigest()))


@dataclass(frozen=True)
class Compare:
    """Task of a worker: compare what a side holds with what the other side would give for it.

    A unit's regions are those of the tensors that are judged; their copies come from the other side.

    Args:
        tolerance: largest difference of two values, in their own unit; 0: every bit.
        cast: what is judged was converted to this dtype: the other side's values are converted likewise first.
    """

    tolerance: float = 0.0
    cast: str | None = None

    def start(self) -> Any:
        return _Comparer(self)


class _Comparer:
    def __init__(self, task: Compare) -> None:
        self._task, self._reader = task, Reader()

    def __call__(self, unit: Unit) -> Facts:
        facts = Facts(unit.id, unit.num_bytes)
        for region in unit.regions:
            self._compare(region, facts)
        return facts

    def _compare(self, region: Region, facts: Facts) -> None:
        """Each copy on its own: where none lies is padding, which belongs to one side only."""
        judged, name = region.stored, region.stored.name
        found = Difference()
        bad = 0
        for copy in region.copies:
            mine, other = judged.values_dtype, copy.source.values_dtype
            if mine != other and mine != self._task.cast and not self._task.tolerance:
                found.add(Difference(dtypes=f"{mine} against {other}"))
                break
            # With a tolerance, values are compared as they are stored, not after rounding one side to the other.
            dtype = mine if mine == self._task.cast else promoted([mine, other])
            for part, theirs in gathered((copy,), copy.target_box, dtype, self._reader):
                ours = self._reader.read(judged, part)
                bad += count_non_finite(ours)
                found.add(_difference(ours, theirs, self._task.tolerance))
        if found:
            facts.differences.setdefault(name, Difference()).add(found)
        if bad:
            facts.non_finite[name] = facts.non_finite.get(name, 0) + bad


def gathered(copies: tuple[Copy, ...], box: Box, dtype: str, reader: Reader) -> Iterator[tuple[Box, Array]]:
    """(part, values) of a box, a slab at a time in row-major order; the array is used again for the next slab."""
    kind = numpy_dtype(dtype)
    buffer = np.empty(0, kind)
    padded = sum(box_size(copy.target_box) for copy in copies) < box_size(box)
    for part in _slabs(box, kind.itemsize):
        size = box_size(part)
        if buffer.size < size:
            buffer = np.empty(size, kind)
        slab = buffer[:size].reshape(box_shape(part))
        if padded:
            slab.fill(0)
        for copy in copies:
            shared = overlap(copy.target_box, part) if part else ()
            if shared is None:
                continue
            values = _values(copy, shared, reader)
            place = slab[slices(tuple((a - f, b - f) for (a, b), (f, _) in zip(shared, part, strict=True)))]
            with np.errstate(over="ignore", invalid="ignore"):
                place[...] = values.reshape(place.shape)
        yield part, slab


def _values(copy: Copy, shared: Box, reader: Reader) -> Array:
    """What a copy brings to a part of its target box, in the source's dtype.

    What is added to bf16 or fp16 weights is added in fp32 and the sum rounded, as torch's ``weight.data += delta`` does
    (peft/tuners/lora/layer.py, ``Linear.merge``).
    """
    values = reader.read(copy.source, moved(shared, copy.target_box, copy.source_box))
    if copy.delta is None:
        return values
    delta = low_rank(copy.delta, moved(shared, copy.target_box, copy.delta.box), reader)
    wide = np.promote_types(delta.dtype, np.float64 if values.dtype == np.float64 else np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return (values.reshape(delta.shape).astype(wide) + delta.astype(wide)).astype(values.dtype)


def low_rank(delta: Delta, box: Box, reader: Reader) -> Array:
    """``(b @ a * scaling)[box]`` in fp32, or fp64 if that is what the matrices are stored in.

    PEFT loads adapters as fp32 (``autocast_adapter_dtype``) and multiplies in it (``Linear.get_delta_weight``). How a
    product is rounded may depend on its shape, and how a matrix is cut into slabs must not show in its values: so all
    of a tile of a fixed grid is computed whenever a part of it is wanted.
    """
    kind = np.dtype(np.float64 if delta.b.stored.dtype == "F64" else np.float32)
    (top, bottom), (left, right) = box
    found = np.empty((bottom - top, right - left), kind)
    whole = delta.b.stored.shape[0], delta.a.stored.shape[1]
    inner = (0, delta.a.stored.shape[0])
    columns = _tiles((left, right), _TILE[1], whole[1])
    wide = (columns[0][0], columns[-1][1])
    a = _matrix(delta.a, (inner, wide), kind, reader)
    for rows in _tiles((top, bottom), _TILE[0], whole[0]):
        b = _matrix(delta.b, (rows, inner), kind, reader)
        for start, stop in columns:
            tile = (b @ np.ascontiguousarray(a[:, start - wide[0] : stop - wide[0]])) * kind.type(delta.scaling)
            shared = overlap((rows, (start, stop)), box)
            assert shared is not None
            found[slices(moved(shared, box, ((0, bottom - top), (0, right - left))))] = tile[
                slices(moved(shared, (rows, (start, stop)), ((0, rows[1] - rows[0]), (0, stop - start))))
            ]
    return found


def _tiles(interval: tuple[int, int], size: int, bound: int) -> list[tuple[int, int]]:
    """The intervals of a grid that an interval touches; the last of the grid may be shorter."""
    first = interval[0] // size * size
    return [(start, min(start + size, bound)) for start in range(first, interval[1], size)]


def _matrix(region: Region, box: Box, kind: np.dtype[Any], reader: Reader) -> Array:
    """A part of a matrix that is made up of copies."""
    found = np.empty(box_shape(box), kind)
    for copy in region.copies:
        shared = overlap(copy.target_box, box)
        if shared is not None:
            values = reader.read(copy.source, moved(shared, copy.target_box, copy.source_box))
            place = found[slices(moved(shared, box, tuple((0, extent) for extent in found.shape)))]
            place[...] = values.reshape(place.shape)
    return found


def _slabs(box: Box, item_size: int) -> Iterator[Box]:
    """A box cut along its first dimension that has more than one index; what is before it has extent 1."""
    axis = next((k for k, (start, stop) in enumerate(box) if stop - start > 1), None)
    if axis is None:
        yield box
        return
    row = item_size * box_size(box[axis + 1 :])
    step = max(1, _SLAB_BYTES // row)
    first, last = box[axis]
    for start in range(first, last, step):
        yield (*box[:axis], (start, min(start + step, last)), *box[axis + 1 :])


def count_non_finite(values: Array) -> int:
    """How many values are NaN or infinite; by their exponents' bits, which takes a fraction of isfinite's time."""
    name, width = values.dtype.name, values.dtype.itemsize
    masks = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000, "float64": 0x7FF0000000000000}
    if name not in masks or not values.size:
        return 0
    bits = values.reshape(-1).view(f"u{width}")
    mask = bits.dtype.type(masks[name])
    exponents = bits & mask
    return int(np.count_nonzero(exponents == mask)) if exponents.max() == mask else 0


def _refuse_overflow(region: Region, part: Box, reader: Reader) -> None:
    """fp16 reaches 65504 only: a value beyond it must not become infinity without a word."""
    for copy in region.copies:
        shared = overlap(copy.target_box, part)
        if shared is None or copy.source.values_dtype == "F16":
            continue
        values = _values(copy, shared, reader)
        wide = values.astype(np.float32)
        if np.isinf(wide.astype(np.float16)).sum() > np.isinf(wide).sum():
            raise RunError(f"{region.stored.name} has values beyond float16's range", "use --dtype bf16 or fp32")


def _difference(ours: Array, theirs: Array, tolerance: float) -> Difference:
    """Bit for bit without a tolerance: NaN equals itself then."""
    ours = np.ascontiguousarray(ours)
    if not tolerance and ours.dtype == theirs.dtype:
        kind = f"u{ours.dtype.itemsize}"
        unequal = ours.reshape(-1).view(kind) != theirs.reshape(-1).view(kind)
        if not unequal.any():
            return Difference()
        gaps = np.abs(ours.reshape(-1)[unequal].astype(np.float64) - theirs.reshape(-1)[unequal].astype(np.float64))
        return Difference(int(unequal.sum()), float(gaps.max()))
    gaps = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    beyond = ~(gaps <= tolerance)
    return Difference(int(beyond.sum()), float(gaps[beyond].max()) if beyond.any() else 0.0)


def _hash_sources(sources: tuple[StoredTensor, ...], reader: Reader, facts: Facts) -> None:
    for stored in sources:
        found = facts.source_hashes.setdefault(stored.name, [])
        for extent in stored.extents:
            found.append(xxhash.xxh3_128_hexdigest(_bytes_of(reader.extent(stored, extent))))


def _bytes_of(values: Array) -> memoryview:
    """The bytes of an array, row-major; without a copy where they lie so."""
    flat: Any = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return memoryview(flat)


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
