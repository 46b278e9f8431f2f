"""What a user points at, opened: its format, its model, its weights, checked before anything is written."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_dist.converters.adapters import is_adapter
from swift_dist.converters.dist_index import METADATA_NAME, DistSide, check_dist, dist_index
from swift_dist.converters.hf_side import check_hf_folder
from swift_dist.converters.legacy_io import TRACKER
from swift_dist.converters.mapping import Rows, duplicates
from swift_dist.converters.plan import HFSide, Side
from swift_dist.converters.safetensors_io import HFFolder
from swift_dist.converters.stored import StoredTensor
from swift_dist.errors import JobError
from swift_dist.models import Family, find_family

if TYPE_CHECKING:
    from swift_dist.converters.adapters import Lora
    from swift_dist.converters.legacy_io import LegacyCheckpoint

logger = logging.getLogger(__name__)

RECORD_NAME = "swift_dist.json"  # of our own checkpoints (swift_dist/checkpoint/folder.py)
ADAPTER_CONFIG = "adapter_config.json"  # of an adapter that PEFT saved, and of an adapter's checkpoint
HF_SUBFOLDER = "hf"  # of converted Megatron checkpoints: config.json, tokenizer and the like
_STEP = re.compile(r"(?:step|iter)_(\d+)")
Config = Mapping[str, Any]


@dataclass
class Source:
    """An opened checkpoint or model folder.

    Attributes:
        kind: "hf", "peft", "torch_dist" or "legacy".
        path: the folder that holds the weights.
        side: for plans. rows: of its model. ignored: names of what is not weights.
        twins: pairs of stored tensors that must be equal, and of which only the first is read.
        record: of our own checkpoints: step and metadata; {} of others.
        model: the ``model`` section of the run that it belongs to; {} where there is none.
        lora: of an adapter: how it is scaled; `rows` are then the adapter's, `hf_config` its model's.
        merged: the adapter that `side` adds to the weights.
    """

    kind: str
    path: Path
    family: Family
    hf_config: dict[str, Any]
    rows: Rows
    side: Side
    ignored: list[str] = field(default_factory=list)
    twins: list[tuple[StoredTensor, StoredTensor]] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    legacy: LegacyCheckpoint | None = None
    lora: Lora | None = None
    merged: Source | None = None

    @property
    def files(self) -> list[str]:
        """Paths of the files that hold weights, those of a merged adapter included."""
        own = {extent.file for stored in self.side.tensors.values() for extent in stored.extents}
        return sorted(own.union(self.merged.files if self.merged else ()))


def open_source(
    path: str,
    hf_config: str | None = None,
    key: str = "source",
    known: Mapping[str, Any] | None = None,
    *,
    adapters: bool = False,
) -> Source:
    """Open a folder of any format.

    Args:
        hf_config: config.json or its folder, where the folder itself does not say what model it is.
        key: of the option that errors name.
        known: a config.json to use where neither of these has one.
        adapters: an adapter will do as well; else it is refused.

    Raises:
        JobError: it is none, is damaged, or does not hold the model of its config.
    """
    kind, folder = find_kind(Path(path), key)
    stated = read_config(Path(hf_config), "hf_config") if hf_config else None
    if kind == "hf":
        return _open_hf(folder, stated, key)
    if kind == "legacy":
        return _open_legacy(folder, stated, known, key)
    if kind == "peft":
        from swift_dist.convert.adapters import open_peft

        source = open_peft(folder, stated or known, key)
    else:
        source = _open_dist(folder, stated, known, key)
    if source.lora is not None and not adapters:
        raise JobError(key, f"{path} is an adapter", "use convert hf-to-megatron or megatron-to-hf")
    return source


def find_kind(path: Path, key: str) -> tuple[str, Path]:
    """(format, folder of the weights) of what a user points at: the folder itself, or the newest checkpoint in it.

    Raises:
        JobError: there is nothing that is known.
    """
    if not path.is_dir():
        raise JobError(key, f"{path} is not a folder", "name a model folder, a run folder or a checkpoint")
    if kind := _megatron_kind(path):
        return kind, path
    if (path / ADAPTER_CONFIG).is_file() and (next(path.glob("adapter_model.*"), None) or not _has_config(path)):
        return "peft", path
    if any(next(path.glob(pattern), None) for pattern in ("*.safetensors*", "pytorch_model*")):
        return "hf", path
    for inner in (*_inner_checkpoints(path, key), *_inner_checkpoints(path / "checkpoints", key)):
        if kind := _megatron_kind(inner):
            return kind, inner
    if _has_config(path):
        raise JobError(key, f"{path} holds a config.json but no weights", "download the model completely")
    raise JobError(
        key,
        f"{path} holds neither Hugging Face weights nor a Megatron checkpoint",
        "name a model folder, a run folder or a checkpoint",
    )


def _megatron_kind(folder: Path) -> str | None:
    """The format of a checkpoint that lies directly in a folder."""
    if (folder / METADATA_NAME).is_file():
        return "torch_dist"
    return "legacy" if folder.is_dir() and next(folder.glob("mp_rank_*"), None) is not None else None


def _has_config(path: Path) -> bool:
    return (path / "config.json").is_file()


def _inner_checkpoints(folder: Path, key: str) -> list[Path]:
    """Checkpoints in a folder, the one to take first: only what Megatron-LM's tracker names, else the newest first.

    Raises:
        JobError: the tracker names none.
    """
    if not folder.is_dir():
        return []
    tracker = folder / TRACKER
    if tracker.is_file():
        name = tracker.read_text(errors="replace").strip()
        named = folder / (f"iter_{int(name):07d}" if name.isdigit() else "release")
        if not (name.isdigit() or name == "release") or _megatron_kind(named) is None:
            raise JobError(key, f"{tracker} names {name!r}, and there is no such checkpoint", "name one of them itself")
        return [named]
    steps = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(steps, reverse=True)]


def _open_hf(folder: Path, stated: Mapping[str, Any] | None, key: str) -> Source:
    config = dict(stated) if stated else read_config(folder, key)
    weights = HFFolder(folder, key)
    family, config = family_of(config, weights.tensors)
    rows = family.rows(config)
    ignored = check_hf_folder(weights.tensors, folder, rows, key)
    tensors = {name: stored for name, stored in weights.tensors.items() if name not in ignored}
    twins = [(tensors[row.of], tensors[row.hf]) for row in duplicates(rows) if row.hf in tensors]
    return Source("hf", folder, family, config, rows, HFSide(tensors), ignored, twins)


def _open_dist(folder: Path, stated: Config | None, known: Config | None, key: str) -> Source:
    record, model = _read_record(folder, key), _recorded_model(folder)
    own = _config_of_checkpoint(folder, record, model)
    _warn_of_other_config(stated, own)
    config = dict(stated or own or known or {})
    if not config:
        raise _no_config()
    tensors = dist_index(folder, key)
    if is_adapter(tensors):
        from swift_dist.convert.adapters import open_adapter_checkpoint

        return replace(open_adapter_checkpoint(folder, tensors, config, key), record=record, model=model)
    family, config = family_of(config, tensors)
    side, rows = DistSide(tensors), family.rows(config)
    ignored = check_dist(side, rows, key)
    side = DistSide({name: stored for name, stored in side.tensors.items() if name not in set(ignored)})
    return Source("torch_dist", folder, family, config, rows, side, ignored, record=record, model=model)


def _open_legacy(folder: Path, stated: Config | None, known: Config | None, key: str) -> Source:
    from swift_dist.converters.legacy_arguments import config_of_arguments
    from swift_dist.converters.legacy_io import LegacyCheckpoint, LegacySide, check_legacy

    checkpoint = LegacyCheckpoint(folder, key)
    own = _config_of_checkpoint(folder, {}, {})
    _warn_of_other_config(stated, own)
    config = dict(stated or own or known or config_of_arguments(checkpoint.args) or {})
    if not config:
        raise _no_config()
    family, config = family_of(config, [name.rpartition("/")[2] for name in checkpoint.tensors])
    shape, rows = family.shape(config), family.rows(config)
    side = LegacySide(checkpoint, shape.num_layers, shape.num_experts or 0)
    ignored = check_legacy(side, rows, key)
    record = {"step": checkpoint.iteration} if checkpoint.iteration is not None else {}
    twins = side.replicas(rows)
    return Source("legacy", folder, family, config, rows, side, ignored, twins, record, legacy=checkpoint)


def _warn_of_other_config(stated: Config | None, own: Config | None) -> None:
    """What --hf_config says counts; that the checkpoint's own config.json says otherwise may be a mistake."""
    differing = sorted(key for key in (own or {}) if stated and key in stated and stated[key] != (own or {})[key])
    if differing:
        logger.warning("--hf_config differs from the checkpoint's own config in %s", ", ".join(differing))


def _no_config() -> JobError:
    return JobError(
        "hf_config", "the checkpoint does not say what model it is", "give --hf_config FOLDER or config.json"
    )


def family_of(config: dict[str, Any], names: Collection[str]) -> tuple[Family, dict[str, Any]]:
    """The family, and the config as this folder's weights have it (a folder may lack layers for prediction).

    How the weights are quantised is the reader's business (`HFFolder`): what becomes of them is plain.
    """
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        family = find_family(config)
        config = family.for_folder(config, names)
        family.rows(config)
        family.shape(config)
    except JobError as error:
        key = error.key.removeprefix("model.config.")
        raise JobError("hf_config", f"{key} {error.message}", error.remedy) from None
    return family, config


def _config_of_checkpoint(folder: Path, record: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any] | None:
    """The model's config.json: from the checkpoint's metadata, beside the weights, or of the run's job."""
    recorded = dict(record.get("metadata") or {}).get("hf_config") or model.get("config")
    if recorded:
        return dict(recorded)
    places = places_of_config(folder)
    if model.get("path"):
        places.append(Path(model["path"]))
    for place in places:
        if (place / "config.json").is_file():
            return read_config(place, "hf_config")
    return None


def places_of_config(folder: Path) -> list[Path]:
    """Where a Megatron checkpoint's config.json may lie."""
    above = [folder.parent / HF_SUBFOLDER] if folder.name == "release" or _STEP.fullmatch(folder.name) else []
    return [folder / HF_SUBFOLDER, *above, folder]


def _read_record(folder: Path, key: str) -> dict[str, Any]:
    """The checkpoint's record; {} for folders that others wrote. Checks that the recorded files are whole."""
    file = folder / RECORD_NAME
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_bytes())
        sizes = {name: entry["bytes"] for name, entry in record["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise JobError(key, f"{file} cannot be read: {error}", "use another checkpoint") from None
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise JobError(key, f"{path} is missing or not whole ({size} bytes were written)", "use another one")
    return record


def _recorded_model(folder: Path) -> dict[str, Any]:
    """The ``model`` section of the run that the checkpoint belongs to; {} where there is none beside it."""
    from swift_dist.config.load import read_yaml

    job = folder.parent.parent / "job.yaml"
    section = read_yaml(job).get("model") if job.is_file() else None
    return dict(section) if isinstance(section, Mapping) else {}


def read_config(path: Path, key: str) -> dict[str, Any]:
    """A config.json, given as a file or as its folder."""
    file = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError(key, f"{file} cannot be read: {error}", "give a folder with a config.json") from None
    if not isinstance(content, dict):
        raise JobError(key, f"{file} does not hold a JSON object", "give a folder with a config.json")
    return content
