"""`swift-dist convert megatron-to-hf SRC DST`: a training checkpoint becomes a Hugging Face model folder.

Reads torch_dist tensors by name: no process group, no model object, no GPU, one tensor in memory at a time. The target
folder appears when it is complete. Importing this module is cheap: torch comes with `run`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from swift_dist import plugins
from swift_dist.config import Section
from swift_dist.converters.special_tokens import SPECIAL_IDS, with_special_ids
from swift_dist.errors import JobError, RunError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swift_dist.converters.dist_checkpoint_io import DistCheckpoint
    from swift_dist.converters.hf_export import ExportPlan

logger = logging.getLogger(__name__)

_RECORD = "swift_dist.json"  # the checkpoint's own record: step, metadata, file sizes (swift_dist/checkpoint/folder.py)
_STEP = re.compile(r"step_(\d+)")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
_TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
_GENERATION = "generation_config.json"


class MegatronToHFOptions(Section):
    source: str = Field(description="run folder, its checkpoints folder, or one step_<n> folder (torch_dist)")
    target: str = Field(description="Hugging Face folder to write; must not exist")
    dtype: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="of the written weights (default: as stored)"
    )
    max_shard_size: str = Field("5GB", description="largest weight file, e.g. 5GB or 512MiB")
    hf_config: str | None = Field(None, description="config.json, or its folder (default: what the run recorded)")
    tokenizer: str | None = Field(None, description="tokenizer folder to add (default: the run's model.tokenizer)")
    dry_run: bool = Field(False, description="print what would be read and written; write nothing")


def run(options: MegatronToHFOptions) -> dict[str, Any]:
    """Convert, or with ``dry_run`` only plan.

    Returns:
        ``{"source", "target", "family", "step", "dtype", "tensors", "parameters", "bytes", "files", "other_files",
        "ignored_tensors", "seconds", "dry_run"}``.

    Raises:
        JobError: source, target or config are wrong; nothing was written.
        RunError: reading or writing failed; nothing is left behind.
    """
    from swift_dist.converters.hf_export import DTYPES, plan_export, write_export
    from swift_dist.converters.safetensors_io import plan_shards

    started = time.monotonic()
    limit = parse_size(options.max_shard_size)
    source, target = find_step_folder(Path(options.source)), Path(options.target)
    _check_target(target)
    record = _read_record(source)
    model = _recorded_model(source)
    hf_config = _hf_config(options, record, model)
    family = _family(hf_config)
    checkpoint = _open(source)
    dtype = DTYPES[options.dtype] if options.dtype else None
    plan = plan_export(checkpoint, family.rows(hf_config), dtype)
    extra = _companions(options.tokenizer, model)
    hf_config = with_special_ids(hf_config, extra)
    result = {
        "source": str(source),
        "target": str(target),
        "family": family.name,
        "step": record.get("step"),
        "dtype": _dtype_name(plan),
        "tensors": len(plan.specs),
        "parameters": plan.num_parameters,
        "bytes": plan.num_bytes,
        "files": list(plan_shards(plan.specs, limit)),
        "other_files": sorted({"config.json", _GENERATION, *extra}),
        "ignored_tensors": plan.ignored,
        "dry_run": options.dry_run,
    }
    if not options.dry_run:
        _check_space(target, plan.num_bytes)
        with _appears_whole(target) as folder:
            write_export(plan, checkpoint, folder, limit)
            _write_config(folder, hf_config, family, _dtype_name(plan))
            for name, file in extra.items():
                shutil.copyfile(file, folder / name)
            if _GENERATION not in extra:
                ids = json.dumps({key: hf_config[key] for key in SPECIAL_IDS}, indent=2)
                (folder / _GENERATION).write_text(ids + "\n", encoding="utf-8")
    return {**result, "seconds": round(time.monotonic() - started, 3)}


def render(result: Mapping[str, Any]) -> str:
    """The result for people."""
    verb = "would write" if result["dry_run"] else "wrote"
    step = f", step {result['step']}" if result["step"] is not None else ""
    return "\n".join(
        [
            f"{verb} {result['target']}: {result['family']}, {result['parameters']:,} parameters as {result['dtype']}, "
            f"{result['bytes'] / 2**20:,.1f} MiB in {len(result['files'])} file(s)",
            f"  from {result['source']}{step}; {result['ignored_tensors']} tensors of it are not weights",
            f"  beside the weights: {', '.join(result['other_files'])}",
        ]
    )


def parse_size(text: str) -> int:
    """Bytes in ``5GB`` (powers of 1000) or ``5GiB`` (of 1024).

    Raises:
        JobError: it is not a positive size.
    """
    found = _SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if size < 1:
        raise JobError("max_shard_size", f"{text!r} is no size", "write for example 5GB or 512MiB")
    return size


def find_step_folder(source: Path) -> Path:
    """The torch_dist folder that a user points at: itself, or the newest step of a checkpoints or run folder.

    Raises:
        JobError: there is none.
    """
    if (source / ".metadata").is_file():
        return source
    if not source.is_dir():
        raise JobError("source", f"{source} is not a folder", "name a run folder or one of its checkpoints")
    for folder in (source / "checkpoints", source):
        steps = [
            (int(found[1]), path)
            for path in (folder.iterdir() if folder.is_dir() else ())
            if (found := _STEP.fullmatch(path.name)) and (path / ".metadata").is_file()
        ]
        if steps:
            return max(steps)[1]
    raise JobError("source", f"{source} holds no torch_dist checkpoint", "name a run folder or one of its checkpoints")


def _open(source: Path) -> DistCheckpoint:
    from swift_dist.converters.dist_checkpoint_io import DistCheckpoint

    try:
        return DistCheckpoint(source)
    except Exception as error:  # whatever a damaged or forged index makes the unpickler raise
        raise JobError("source", f"{source / '.metadata'} cannot be read: {error}", "use another checkpoint") from None


def _read_record(source: Path) -> dict[str, Any]:
    """The checkpoint's record; {} for folders that others wrote. Checks that the recorded files are whole."""
    file = source / _RECORD
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_bytes())
        sizes = {name: entry["bytes"] for name, entry in record["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise JobError("source", f"{file} cannot be read: {error}", "use another checkpoint") from None
    for name, size in sizes.items():
        path = source / name
        if not path.is_file() or path.stat().st_size != size:
            raise JobError("source", f"{path} is missing or not whole ({size} bytes were written)", "use another one")
    return record


def _recorded_model(source: Path) -> dict[str, Any]:
    """The ``model`` section of the run that the checkpoint belongs to; {} where there is none beside it."""
    from swift_dist.config.load import read_yaml

    job = source.parent.parent / "job.yaml"
    section = read_yaml(job).get("model") if job.is_file() else None
    return dict(section) if isinstance(section, Mapping) else {}


def _hf_config(options: MegatronToHFOptions, record: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """The model's config.json: from the command line, the checkpoint's metadata, or the run's job."""
    if options.hf_config is not None:
        return _read_json(Path(options.hf_config), "hf_config")
    recorded = dict(record.get("metadata") or {}).get("hf_config") or model.get("config")
    if recorded:
        return dict(recorded)
    path = model.get("path")
    if path and (Path(path) / "config.json").is_file():
        return _read_json(Path(path), "hf_config")
    raise JobError(
        "hf_config", "the checkpoint does not say what model it is", "give --hf_config FOLDER or config.json"
    )


def _read_json(path: Path, key: str) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError(key, f"{file} cannot be read: {error}", "give a folder with a config.json") from None
    if not isinstance(content, dict):
        raise JobError(key, f"{file} does not hold a JSON object", "give a folder with a config.json")
    return content


def _family(hf_config: Mapping[str, Any]) -> Any:
    """The family, found by its name: this room knows no families (they know its mappings)."""
    model_type = str(hf_config.get("model_type"))
    try:
        return plugins.find("swift_dist.models", model_type, "FAMILY")
    except plugins.UnknownPlugin as error:
        raise JobError("hf_config", f"model_type {error}", "give the config.json of a supported family") from None


def _companions(tokenizer: str | None, model: Mapping[str, Any]) -> dict[str, Path]:
    """Files that travel with the weights, by the name they get: the tokenizer's, and generation settings."""
    found: dict[str, Path] = {}
    stated = tokenizer or model.get("tokenizer") or model.get("path")
    if stated:
        folder = Path(stated) if Path(stated).is_dir() else Path(stated).parent if Path(stated).is_file() else None
        if folder is None and tokenizer:
            raise JobError("tokenizer", f"there is no {tokenizer}", "give the folder that holds tokenizer.json")
        if folder is None:
            logger.warning("the tokenizer %s is not on this machine: add it with --tokenizer FOLDER", stated)
        else:
            found.update((path.name, path) for path in folder.glob("*.tiktoken"))
            found.update((name, folder / name) for name in _TOKENIZER_FILES if (folder / name).is_file())
            if tokenizer and not found:
                raise JobError("tokenizer", f"{folder} holds no tokenizer files", "give the folder with tokenizer.json")
    generation = Path(model.get("path") or "") / _GENERATION
    if model.get("path") and generation.is_file():
        found[_GENERATION] = generation
    return found


def _write_config(folder: Path, hf_config: Mapping[str, Any], family: Any, dtype: str) -> None:
    """config.json as it was, with what the weights now are; keys that an inline config left out are added."""
    config = {"architectures": list(family.architectures[:1]), **hf_config, "model_type": family.name}
    config.pop("torch_dtype", None)
    config["dtype"] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(dtype, "float32")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _dtype_name(plan: ExportPlan) -> str:
    from swift_dist.converters.hf_export import DTYPES

    used = {spec.dtype for spec in plan.specs}
    names = [name for name, dtype in DTYPES.items() if dtype in used]
    return names[0] if len(names) == 1 else "mixed"


def _check_target(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise JobError("target", f"{target} exists", "name a folder that does not exist yet, or remove it")


def _check_space(target: Path, num_bytes: int) -> None:
    parent = next(path for path in target.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise JobError(
            "target", f"{parent} has {free / 2**30:.2f} GiB free; {num_bytes / 2**30:.2f} are needed", "free some"
        )


@contextmanager
def _appears_whole(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target that gets its name if the block ends well, and is removed otherwise."""
    temporary = target.absolute().with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.iterdir(), temporary]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        temporary.rename(target.absolute())
    except OSError as error:
        raise RunError(f"{target} cannot be written: {error}", "check the disk, then run the command again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
