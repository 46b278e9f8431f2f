"""PEFT adapters in the `convert` verbs: opened, written in either format, merged into the weights of a model."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from swift_dist.convert.companions import companions
from swift_dist.convert.conversion import Target
from swift_dist.convert.options import ConvertOptions
from swift_dist.convert.sources import (
    ADAPTER_CONFIG,
    HF_SUBFOLDER,
    Source,
    family_of,
    find_kind,
    places_of_config,
    read_config,
)
from swift_dist.converters.adapters import (
    Lora,
    MergedSide,
    adapter_rows,
    check_lora,
    check_peft_names,
    check_ranks,
    deltas,
    dist_ranks,
    is_adapter,
    peft_ranks,
    projections,
)
from swift_dist.converters.dist_index import DistSide, check_dist, dist_index
from swift_dist.converters.hf_side import check_hf_folder
from swift_dist.converters.mapping import Rows, duplicates, hf_shapes
from swift_dist.converters.plan import HFSide, hf_dtypes, megatron_dtypes, repeated_names
from swift_dist.converters.safetensors_io import TensorSpec, lay_out, parse_size, read_bin, read_safetensors
from swift_dist.converters.stored import BY_OPTION, StoredTensor
from swift_dist.errors import JobError

logger = logging.getLogger(__name__)

WEIGHTS = "adapter_model.safetensors"
_BIN = "adapter_model.bin"


def open_peft(folder: Path, config: Mapping[str, Any] | None, key: str, rows: Rows | None = None) -> Source:
    """Open a folder that PEFT saved.

    Args:
        config: the model's config.json; None: that of ``base_model_name_or_path``, if it is a folder here.
        rows: of the model, where they are known.

    Raises:
        JobError: it is damaged, is no plain LoRA, or does not fit the model.
    """
    lora = check_lora(_read_adapter_config(folder, key), key)
    tensors = adapter_tensors(folder, key)
    if config is None:
        config = _base_config(lora, key)
    family, config = family_of(dict(config), [_weight_name(name) for name in tensors])
    found = adapter_rows(family.rows(config) if rows is None else rows, peft_ranks(tensors), key)
    check_peft_names(tensors, found, key)
    check_hf_folder(tensors, folder, found, key)
    check_ranks(found, lora, key)
    return Source("peft", folder, family, config, found, HFSide(tensors), lora=lora)


def open_adapter_checkpoint(
    folder: Path, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], key: str, rows: Rows | None = None
) -> Source:
    """Open a torch_dist checkpoint of an adapter, canonical or fused; see `converters/adapters.py`.

    Raises:
        JobError: nothing says how it is scaled, it is no plain LoRA, does not fit the model, or holds weights too.
    """
    place = next((place for place in places_of_config(folder) if (place / ADAPTER_CONFIG).is_file()), None)
    if place is None:
        raise JobError(
            key,
            f"{folder} holds an adapter and no {HF_SUBFOLDER}/{ADAPTER_CONFIG}, which says how it is scaled",
            'write it: {"r": ..., "lora_alpha": ...} suffices',
        )
    lora = check_lora(_read_adapter_config(place, key), key)
    side = DistSide(tensors)
    weights = [name for name in side.weights() if ".adapter." not in name]
    if weights:
        raise JobError(
            key,
            f"{folder} holds an adapter and {len(weights)} weights of the model beside it ({weights[0]})",
            "save the adapter on its own",
        )
    family, config = family_of(dict(config), tensors.keys())
    found = adapter_rows(family.rows(config) if rows is None else rows, dist_ranks(side), key)
    try:
        lora = _completed(lora, found)
    except ValueError as error:
        raise JobError(key, f"{folder} holds an adapter twice, fused and not: {error}", "save one form") from None
    ignored = check_dist(side, found, key)
    check_ranks(found, lora, key)
    side = DistSide({name: stored for name, stored in tensors.items() if name not in set(ignored)})
    return Source("torch_dist", folder, family, config, found, side, ignored, lora=lora)


def with_adapter(source: Source, path: str | None) -> Source:
    """The source with an adapter merged into its weights; as it is where no adapter is named.

    Raises:
        JobError: it is no adapter, or none of this model.
    """
    if path is None:
        return source
    if source.lora is not None:
        raise JobError("adapter", f"{source.path} is an adapter itself", "name the model to merge it into as source")
    kind, folder = find_kind(Path(path), "adapter")
    adapter = None
    if kind == "peft":
        adapter = open_peft(folder, source.hf_config, "adapter", source.rows)
    elif kind == "torch_dist":
        tensors = dist_index(folder, "adapter")
        if is_adapter(tensors):
            adapter = open_adapter_checkpoint(folder, tensors, source.hf_config, "adapter", source.rows)
    if adapter is None:
        raise JobError("adapter", f"{path} is no adapter", "name a folder with adapter_config.json")
    assert adapter.lora is not None
    _warn_of_other_base(source, adapter)
    added = deltas(adapter.rows, adapter.side, adapter.lora)
    return replace(source, side=MergedSide(source.side, added), merged=adapter)


def _warn_of_other_base(source: Source, adapter: Source) -> None:
    """Shapes that fit do not make an adapter one of this model."""
    stated = (adapter.lora.config if adapter.lora else {}).get("base_model_name_or_path")
    beside = adapter.path / HF_SUBFOLDER
    theirs = next((p for p in (beside, Path(str(stated or ""))) if (p / "config.json").is_file()), None)
    other = read_config(theirs, "adapter").get("model_type") if theirs is not None else None
    if other not in (None, source.family.name):
        raise JobError("adapter", f"{adapter.path} was trained on a {other} model", f"name one of {source.family.name}")
    if stated and Path(str(stated)).name != source.path.name:
        logger.warning("the adapter names %s as its base; it is merged into %s", stated, source.path)


def like(source: Source, other: Source) -> Source:
    """A PEFT folder described by the rows of another source, where those describe the same tensors.

    A fused checkpoint has rows of its own: several projections share an A, so a PEFT folder must hold equal ones.
    """
    if source.kind != "peft" or other.lora is None or hf_shapes(source.rows) != hf_shapes(other.rows):
        return source
    tensors = source.side.tensors
    twins = [(tensors[row.of], tensors[row.hf]) for row in duplicates(other.rows)]
    return replace(source, rows=other.rows, twins=twins)


def differing_scalings(a: Source, b: Source) -> list[str]:
    """Projections for which two adapters' configs state another scaling, as problems."""
    if a.lora is None or b.lora is None:
        return []
    return [
        f"{name}: scaled by {b.lora.scaling(name)}, not {a.lora.scaling(name)}"
        for name in projections(a.rows)
        if a.lora.scaling(name) != b.lora.scaling(name)
    ]


def peft_target(source: Source, options: ConvertOptions, tokenizer: str | None) -> Target:
    """A PEFT folder of an adapter: one file of weights, since PEFT reads one."""
    wanted = BY_OPTION[options.dtype] if options.dtype else None
    dtypes = hf_dtypes(source.rows, megatron_dtypes(source.rows, source.side, wanted))
    specs = [TensorSpec(name, shape, dtypes[name]) for name, shape in sorted(hf_shapes(source.rows).items())]
    size = sum(spec.num_bytes for spec in specs)
    if size > parse_size(options.max_shard_size):
        raise JobError(
            "max_shard_size", f"the adapter has {size} bytes and PEFT reads it from one file", "give a larger size"
        )
    layout = lay_out({WEIGHTS: specs})
    files = companions(source, tokenizer)

    def finish(folder: Path) -> list[str]:
        for name, file in files.items():
            (folder / name).write_bytes(file.read_bytes())
        return [*files, write_adapter_config(folder, source)]

    side = HFSide(layout.tensors, repeated_names(source.rows, layout.tensors))
    return Target("peft", layout, side, {"tokenizer": tokenizer}, finish, sorted([*files, ADAPTER_CONFIG]))


def write_adapter_config(folder: Path, source: Source) -> str:
    """Write a source's adapter_config.json; returns its name."""
    assert source.lora is not None
    text = json.dumps(dict(source.lora.config), indent=2) + "\n"
    (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
    return ADAPTER_CONFIG


def _completed(lora: Lora, rows: Rows) -> Lora:
    """With what PEFT wants to know of an adapter that was made in Megatron, where its config does not say it.

    Whole names: PEFT would make adapters in all layers for the last words of them.
    """
    targets = list(projections(rows))
    stated = {key: value for key, value in lora.config.items() if value is not None}
    filled = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": targets, "bias": "none"}
    return Lora({**lora.config, **{key: value for key, value in filled.items() if key not in stated}})


def _weight_name(name: str) -> str:
    """What the weight that a PEFT tensor adapts is called."""
    return name.removeprefix("base_model.model.").rpartition(".lora_")[0] + ".weight"


def _read_adapter_config(folder: Path, key: str) -> dict[str, Any]:
    return read_config(folder / ADAPTER_CONFIG, key)


def adapter_tensors(folder: Path, key: str) -> dict[str, StoredTensor]:
    """The tensors of a folder that PEFT saved.

    Raises:
        JobError: there are none, or their file is damaged.
    """
    file = next((folder / name for name in (WEIGHTS, _BIN) if (folder / name).is_file()), None)
    if file is None:
        raise JobError(key, f"{folder} holds an adapter_config.json but no {WEIGHTS}", "download it completely")
    try:
        return read_bin(file) if file.suffix == ".bin" else read_safetensors(file)
    except (OSError, ValueError) as error:
        raise JobError(key, f"{file} is not a whole weight file: {error}", "download it again") from None


def _base_config(lora: Lora, key: str) -> dict[str, Any]:
    """config.json of the model that the adapter was trained on."""
    stated = lora.config.get("base_model_name_or_path")
    if stated and (Path(str(stated)) / "config.json").is_file():
        return read_config(Path(str(stated)), key)
    named = f"its base_model_name_or_path {stated!r} is no folder here" if stated else "it names no base model"
    remedy = "give the model's folder: --base FOLDER of hf-to-megatron, --hf_config of other verbs"
    raise JobError("hf_config", f"the adapter does not say what model it is for: {named}", remedy)
