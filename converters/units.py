"""A plan of copies cut into units of work."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from swift_dist.converters.copying import Unit
from swift_dist.converters.plan import Region
from swift_dist.converters.safetensors_io import FileLayout
from swift_dist.converters.stored import StoredTensor

_UNIT_BYTES = 64 << 20


def fill_units(
    files: Sequence[FileLayout],
    regions: Iterable[Region],
    sources: Iterable[StoredTensor],
    done: Collection[str],
    whole_files: bool,
) -> list[Unit]:
    """What is to be written, by file; the largest units of a file first, so that workers end together.

    Args:
        sources: tensors to hash; each goes to the first unit that reads it. Those of finished files are known.
        done: files that are finished already.
        whole_files: one unit a file (workers on several nodes must not write to one file at once).
    """
    by_file: dict[str, list[Region]] = {file.name: [] for file in files}
    for region in regions:
        by_file[region.stored.extents[0].file].append(region)
    unhashed = {stored.name: stored for stored in sources}
    units: list[Unit] = []
    for number, file in enumerate(files):
        inside = sorted(by_file[file.name], key=lambda region: region.stored.extents[0].offset)
        made: list[Unit] = []
        for group in [inside] if whole_files else list(_groups(inside)):
            names = dict.fromkeys(name for region in group for copy in region.copies for name in copy.reads)
            hashed = tuple(unhashed.pop(name) for name in names if name in unhashed)
            size = sum(region.num_bytes for region in group)
            made.append(Unit((number, len(made)), tuple(group), (), hashed, size))
        if file.name in done:
            continue
        units += sorted(_with_literals(made, file, number), key=lambda unit: -unit.num_bytes)
    return units


def _with_literals(units: list[Unit], file: FileLayout, number: int) -> list[Unit]:
    """Each literal goes to the last unit whose values begin before it; what stands before all, to the first."""
    if not units:
        return [Unit((number, 0), (), file.literals)]
    starts = [unit.regions[0].stored.extents[0].offset if unit.regions else 0 for unit in units]
    shares: list[list[tuple[int, bytes]]] = [[] for _ in units]
    at = 0
    for offset, content in sorted(file.literals):
        while at + 1 < len(units) and starts[at + 1] <= offset:
            at += 1
        shares[at].append((offset, content))
    return [replace(unit, literals=tuple(share)) for unit, share in zip(units, shares, strict=True)]


def compare_units(regions: Iterable[Region]) -> list[Unit]:
    """What is to be compared. Regions without copies are padding, which belongs to one side only."""
    groups = _groups([region for region in regions if region.copies])
    units = [
        Unit((0, number), tuple(group), num_bytes=sum(region.num_bytes for region in group))
        for number, group in enumerate(groups)
    ]
    return sorted(units, key=lambda unit: -unit.num_bytes)


def _groups(regions: Sequence[Region]) -> Iterable[list[Region]]:
    group: list[Region] = []
    size = 0
    for region in regions:
        if group and size + region.num_bytes > _UNIT_BYTES:
            yield group
            group, size = [], 0
        group.append(region)
        size += region.num_bytes
    if group:
        yield group
