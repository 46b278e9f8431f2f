"""Which bytes of which stored tensor become which bytes of which other one: from metadata alone.

A `Side` is a set of stored tensors with a way to say where in them a Megatron tensor's parts lie. Two sides and a
family's rows make the copies, whatever the two formats are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from swift_dist.converters.mapping import (
    Box,
    Duplicate,
    Row,
    TensorMap,
    box_size,
    checkpoint_key,
    duplicates,
    weights,
)
from swift_dist.converters.stored import ITEM_SIZES, ExtentIndex, StoredTensor, moved, overlap


@dataclass(frozen=True, slots=True)
class Delta:
    """What a LoRA adapter adds to a part of a matrix: ``(b @ a * scaling)[box]``, with b [out, r] and a [r, in].

    Args:
        b, a: the matrices: no file holds them as such, but their copies say where each part of them lies.
    """

    b: Region
    a: Region
    scaling: float
    box: Box

    def part(self, origin: Box, box: Box) -> Delta:
        """Of the part that is in the whole as `box` is in `origin`."""
        return replace(self, box=moved(box, origin, self.box))


@dataclass(frozen=True, slots=True)
class Hold:
    """``stored[name][box] == megatron[at]``; `box` may have leading dimensions of extent 1 that `at` lacks.

    Args:
        delta: is to be added to what is stored.
    """

    name: str
    box: Box
    at: Box
    delta: Delta | None = None


class Side(Protocol):
    """The weights on one side of a conversion.

    Attributes:
        tensors: by stored name.
    """

    @property
    def tensors(self) -> Mapping[str, StoredTensor]: ...

    def hold(self, tensor: TensorMap) -> Iterable[Hold]:
        """Where the parts of a Megatron tensor lie."""
        ...


@dataclass(frozen=True, slots=True)
class Copy:
    """``target[target_box] = source[source_box] + delta``. Boxes of equal extents, aligned at their last dimension."""

    target_box: Box
    source: StoredTensor
    source_box: Box
    delta: Delta | None = None

    @property
    def reads(self) -> list[str]:
        """Names of the stored tensors that it reads: factors and an adapter's matrices are among them."""
        names = [self.source.name, *([self.source.scale.name] if self.source.scale else [])]
        matrices = (self.delta.b, self.delta.a) if self.delta else ()
        return names + [name for matrix in matrices for copy in matrix.copies for name in copy.reads]


@dataclass(frozen=True, slots=True)
class Region:
    """One extent of a target tensor and all that goes into it. What no copy covers is padding: zeros.

    Args:
        stored: the target tensor with this one extent.
    """

    stored: StoredTensor
    copies: tuple[Copy, ...]

    @property
    def box(self) -> Box:
        return self.stored.extents[0].box

    @property
    def num_bytes(self) -> int:
        return box_size(self.box) * ITEM_SIZES[self.stored.dtype]


@dataclass
class CopyPlan:
    """All copies of a conversion.

    Args:
        regions: every extent of every target tensor.
        used: names of source tensors that are read, with the number of elements that the target gets of them.
        padding: target elements that no copy covers (vocabulary padding).
    """

    regions: list[Region] = field(default_factory=list)
    used: dict[str, int] = field(default_factory=dict)
    padding: int = 0


@dataclass(frozen=True)
class HFSide:
    """A Hugging Face folder, or what is going to be one.

    Args:
        repeated: of tensors that repeat others (`Duplicate`): their names by what they repeat; written from the same
            source when the folder is a target.
    """

    tensors: Mapping[str, StoredTensor]
    repeated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def hold(self, tensor: TensorMap) -> list[Hold]:
        return [
            Hold(name, piece.hf_box, piece.megatron_box)
            for piece in tensor.pieces
            for name in (piece.hf, *self.repeated.get(piece.hf, ()))
        ]


def repeated_names(rows: Iterable[Row | Duplicate], names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The repetitions among `names`, by what they repeat."""
    there = set(names)
    found: dict[str, tuple[str, ...]] = {}
    for row in duplicates(rows):
        if row.hf in there:
            found[row.of] = (*found.get(row.of, ()), row.hf)
    return found


def make_plan(rows: Iterable[Row | Duplicate], source: Side, target: Side) -> CopyPlan:
    """Compose the two sides.

    The caller has checked that each side holds what the rows describe; here, that every Megatron tensor is wholly in
    the source, and written once.

    Raises:
        ValueError: naming the tensor for which that does not hold: the rows are wrong, or were not checked.
    """
    plan = CopyPlan()
    copies: dict[str, list[Copy]] = {name: [] for name in target.tensors}
    source_index: dict[str, ExtentIndex] = {}
    for tensor in weights(rows):
        sources = list(source.hold(tensor))
        size = box_size(tuple((0, extent) for extent in tensor.shape))
        if sum(box_size(hold.at) for hold in sources) != size:
            raise ValueError(f"{tensor.name} is not exactly once in the source")
        counted: set[Box] = set()
        for hold in target.hold(tensor):
            again = hold.at in counted  # a target may hold a part more than once: replicas of ranks, repeated tensors
            counted.add(hold.at)
            for other in sources:
                shared = overlap(hold.at, other.at)
                if shared is None:
                    continue
                box = moved(shared, other.at, other.box)
                stored = _narrowed(source.tensors[other.name], box, source_index)
                delta = other.delta.part(other.at, shared) if other.delta else None
                copies[hold.name].append(Copy(moved(shared, hold.at, hold.box), stored, box, delta))
                plan.used[other.name] = plan.used.get(other.name, 0) + (0 if again else box_size(shared))
    for name, stored in target.tensors.items():
        plan.regions += _regions(stored, copies[name], plan)
    return plan


def _narrowed(stored: StoredTensor, box: Box, known: dict[str, ExtentIndex]) -> StoredTensor:
    """The tensor with only the extents that a box needs: plans are sent to workers."""
    if len(stored.extents) == 1:
        return stored
    index = known.setdefault(stored.name, ExtentIndex(stored.extents))
    return replace(stored, extents=tuple(extent for extent, _ in index.overlapping(box)))


def _regions(stored: StoredTensor, copies: list[Copy], plan: CopyPlan) -> list[Region]:
    """The extents of a target tensor, each with its copies."""
    index = ExtentIndex(stored.extents)
    inside: dict[Box, list[Copy]] = {extent.box: [] for extent in stored.extents}
    for copy in copies:
        for extent, shared in index.overlapping(copy.target_box):
            if shared != copy.target_box:
                part = moved(shared, copy.target_box, copy.source_box)
                delta = copy.delta.part(copy.target_box, shared) if copy.delta else None
                inside[extent.box].append(Copy(shared, copy.source, part, delta))
            else:
                inside[extent.box].append(copy)
    regions = []
    for extent in stored.extents:
        held = inside[extent.box]
        covered = sum(box_size(copy.target_box) for copy in held)
        if covered > box_size(extent.box):
            raise ValueError(f"{stored.name} would be written more than once")
        plan.padding += box_size(extent.box) - covered
        regions.append(Region(replace(stored, extents=(extent,)), tuple(held)))
    return regions


def megatron_dtypes(rows: Iterable[Row | Duplicate], source: Side, wanted: str | None) -> dict[str, str]:
    """The dtype of each Megatron tensor, by global name: what is wanted, or that of its parts in the source.

    Parts of several dtypes get the narrowest one that holds them all. All experts of a layer get one dtype, since
    checkpoints store them as one tensor.
    """
    found: dict[str, str] = {}
    shared: dict[str, str] = {}
    for tensor in weights(rows):
        stored = [source.tensors[hold.name].values_dtype for hold in source.hold(tensor)]
        dtype = promoted(stored) if wanted is None or tensor.keep_dtype else wanted
        key = checkpoint_key(tensor.name)[0]
        shared[key] = promoted([dtype, shared.get(key, dtype)])
        found[tensor.name] = key
    return {name: shared[key] for name, key in found.items()}


def hf_dtypes(rows: Iterable[Row | Duplicate], dtypes: Mapping[str, str]) -> dict[str, str]:
    """The dtype of each Hugging Face tensor, from those of the Megatron tensors that it is part of."""
    rows = tuple(rows)
    found: dict[str, str] = {}
    for tensor in weights(rows):
        for piece in tensor.pieces:
            found[piece.hf] = promoted([dtypes[tensor.name], found.get(piece.hf, dtypes[tensor.name])])
    return found | {row.hf: found[row.of] for row in duplicates(rows) if row.required}


def promoted(dtypes: Iterable[str]) -> str:
    """The narrowest dtype that holds the values of all."""
    kinds = set(dtypes)
    if len(kinds) == 1:
        return kinds.pop()
    return "F64" if "F64" in kinds else "F32"


def describe_rows(rows: Iterable[Row | Duplicate]) -> list[str]:
    """Each row on a line, for reports."""
    lines = []
    for row in rows:
        if isinstance(row, Duplicate):
            lines.append(f"Duplicate {row.hf} = {row.of}")
            continue
        inner: Any = getattr(row, "row", row)
        count = max(1, len(row.layers)) * getattr(row, "num_experts", 1)
        kind = type(row).__name__ if inner is row else f"{type(row).__name__} of {type(inner).__name__}"
        hf = inner.hf if isinstance(inner.hf, str) else ", ".join(inner.hf)
        lines.append(f"{kind} {inner.megatron} <- {hf} ({count})")
    return lines
