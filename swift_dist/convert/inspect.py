"""`swift-dist convert inspect SRC`: what a checkpoint of any format holds, from its headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from swift_dist.config import Section
from swift_dist.convert.sources import ADAPTER_CONFIG, find_kind, places_of_config, read_config
from swift_dist.converters.adapters import is_adapter
from swift_dist.converters.dist_index import dist_index, is_weight
from swift_dist.converters.safetensors_io import HFFolder
from swift_dist.converters.stored import StoredTensor, natural
from swift_dist.errors import JobError

_NUMBER = re.compile(r"(?<=[._])\d+(?=[._/])")


class InspectOptions(Section):
    source: str = Field(description="model folder, run folder, or Megatron checkpoint (torch_dist or mp_rank_*)")
    match: str | None = Field(None, description="only tensors whose name matches this regular expression")
    full: bool = Field(False, description="a line for every tensor, instead of one for all layers alike")


def run(options: InspectOptions) -> dict[str, Any]:
    """Look at a checkpoint. It need not be of a model that converts.

    Returns:
        ``{"path", "format", "family", "layout", "parameters", "bytes", "dtypes", "files", "tensors", "full"}``;
        ``tensors`` lists ``{"name", "shape", "dtype", "bytes", "weight", "files"}``, and ``parameters`` counts those
        that are weights and not optimizer state.

    Raises:
        JobError: it cannot be read.
    """
    try:
        pattern = re.compile(options.match or "")
    except re.error as error:
        raise JobError("match", f"{options.match!r} is no regular expression: {error}", "correct it") from None
    kind, folder = find_kind(Path(options.source), "source")
    tensors, layout, family = _READERS[kind](folder)
    entries: list[dict[str, Any]] = [
        {
            "name": name,
            "shape": list(stored.shape),
            "dtype": stored.dtype,
            "bytes": stored.num_bytes,
            "weight": is_weight(name),
            "files": sorted({_relative(extent.file, folder) for extent in stored.extents}),
        }
        for name, stored in sorted(tensors.items(), key=lambda item: natural(item[0]))
        if pattern.search(name)
    ]
    weights = [entry for entry in entries if entry["weight"]]
    paths = {extent.file for stored in tensors.values() for extent in stored.extents}
    return {
        "path": str(folder),
        "format": kind,
        "family": family,
        "layout": layout,
        "parameters": sum(tensors[entry["name"]].num_elements for entry in weights),
        "bytes": sum(entry["bytes"] for entry in entries),
        "dtypes": sorted({entry["dtype"] for entry in entries}),
        "files": [{"name": _relative(path, folder), "bytes": Path(path).stat().st_size} for path in sorted(paths)],
        "tensors": entries,
        "full": options.full,
    }


def _read_hf(folder: Path) -> tuple[Mapping[str, StoredTensor], dict[str, Any], str | None]:
    config = read_config(folder, "source") if (folder / "config.json").is_file() else {}
    return HFFolder(folder).tensors, {}, config.get("model_type")


def _read_dist(folder: Path) -> tuple[Mapping[str, StoredTensor], dict[str, Any], str | None]:
    tensors = dist_index(folder)
    keys = "homogeneous" if any(re.search(r"decoder\.layers\.[a-z]", name) for name in tensors) else "per layer"
    if any(name.endswith(("linear_fc1.weight_w", "linear_fc1.weight_v")) for name in tensors):
        keys = "singleton"
    return tensors, {"keys": keys, **({"adapter": "LoRA"} if is_adapter(tensors) else {})}, _family_beside(folder)


def _read_legacy(folder: Path) -> tuple[Mapping[str, StoredTensor], dict[str, Any], str | None]:
    from swift_dist.converters.legacy_io import LegacyCheckpoint

    checkpoint = LegacyCheckpoint(folder)
    degrees = {name: getattr(checkpoint, name) for name in ("tp", "pp", "ep", "vpp", "etp")}
    return checkpoint.tensors, {**degrees, "iteration": checkpoint.iteration}, _family_beside(folder)


def _family_beside(folder: Path) -> str | None:
    """The model type by the config.json beside a Megatron checkpoint, if there is one."""
    places = (place for place in places_of_config(folder) if (place / "config.json").is_file())
    return next((read_config(place, "source").get("model_type") for place in places), None)


def _read_peft(folder: Path) -> tuple[Mapping[str, StoredTensor], dict[str, Any], str | None]:
    from swift_dist.convert.adapters import adapter_tensors

    config = read_config(folder / ADAPTER_CONFIG, "source")
    return adapter_tensors(folder, "source"), {"rank": config.get("r"), "alpha": config.get("lora_alpha")}, None


_READERS = {"hf": _read_hf, "peft": _read_peft, "torch_dist": _read_dist, "legacy": _read_legacy}


def _relative(path: str, folder: Path) -> str:
    return str(Path(path).relative_to(folder)) if Path(path).is_relative_to(folder) else path


def render(result: Mapping[str, Any]) -> str:
    """The table for people: layers (and experts) that look alike share a line."""
    legacy = result["format"] == "legacy"
    layout = ", ".join(f"{name} {value}" for name, value in result["layout"].items())
    head = [
        f"{result['path']}: {result['format']}{f' ({layout})' if layout else ''}"
        f"{', ' + result['family'] if result['family'] else ''}",
        f"  {result['parameters']:,} parameters{' (copies on several ranks counted)' if legacy else ''}, "
        f"{result['bytes'] / 2**20:,.1f} MiB in {len(result['files'])} file(s), {len(result['tensors'])} tensors, "
        f"{', '.join(result['dtypes'])}",
        "",
    ]
    rows = result["tensors"] if result["full"] else _collapsed(result["tensors"])
    width = max((len(row["name"]) for row in rows), default=0)
    shapes = max((len(str(row["shape"])) for row in rows), default=0)
    lines = [
        f"  {row['name'].ljust(width)}  {str(row['shape']).ljust(shapes)}  {row['dtype'].ljust(8)} "
        f"{row['bytes'] / 2**20:12,.2f} MiB{'' if row['weight'] else '  (not a weight)'}"
        for row in rows
    ]
    return "\n".join(head + lines)


def _collapsed(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for tensors that differ in numbers only (``layers.{0-31}``), with the bytes of all."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for entry in entries:
        key = (_NUMBER.sub("#", entry["name"]), tuple(entry["shape"]), entry["dtype"])
        groups.setdefault(key, []).append(entry)
    rows = []
    for group in groups.values():
        numbers = [[int(number) for number in _NUMBER.findall(entry["name"])] for entry in group]
        ranges = iter([_range(sorted(set(column))) for column in zip(*numbers, strict=True)])
        name = _NUMBER.sub(lambda _, ranges=ranges: next(ranges), group[0]["name"])  # type: ignore[misc]
        rows.append({**group[0], "name": name, "bytes": sum(entry["bytes"] for entry in group)})
    return rows


def _range(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}-{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"
