"""Files that travel with the weights: tokenizer, chat template, generation settings, code of the model's authors."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from swift_dist.convert.sources import HF_SUBFOLDER, Source
from swift_dist.convert.special_tokens import SPECIAL_IDS, with_special_ids
from swift_dist.errors import JobError

logger = logging.getLogger(__name__)

GENERATION = "generation_config.json"
_TEMPLATES = "additional_chat_templates"  # where transformers saves templates beside the default one
_TOKENIZER_FILES = frozenset(
    """
    added_tokens.json chat_template.jinja chat_template.json merges.txt special_tokens_map.json tekken.json
    tokenizer.json tokenizer_config.json vocab.json vocab.txt
    """.split()
)
_TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def companions(source: Source, tokenizer: str | None = None) -> dict[str, Path]:
    """The files, by the name that they get.

    Args:
        tokenizer: folder that the user names instead of what the source's model has.

    Raises:
        JobError: there is no such folder, or no tokenizer in it.
    """
    found: dict[str, Path] = {}
    folder = _model_folder(source)
    if folder is not None:
        found.update((path.name, path) for path in folder.iterdir() if _travels(path))
        found.update((f"{_TEMPLATES}/{path.name}", path) for path in (folder / _TEMPLATES).glob("*.jinja"))
    stated = tokenizer or source.model.get("tokenizer")
    if stated:
        found = {name: path for name, path in found.items() if not _is_tokenizer(path)}
        found.update(_tokenizer_files(str(stated), required=tokenizer is not None))
    return dict(sorted(found.items()))


def _model_folder(source: Source) -> Path | None:
    """Where the model's small files lie."""
    if source.kind in ("hf", "peft"):
        return source.path
    places = [source.path / HF_SUBFOLDER, source.path.parent / HF_SUBFOLDER]
    if source.model.get("path"):
        places.append(Path(source.model["path"]))
    return next((place for place in places if place.is_dir()), None)


def _is_tokenizer(path: Path) -> bool:
    return path.name in _TOKENIZER_FILES or path.suffix in (".tiktoken", ".model")


def _travels(path: Path) -> bool:
    """Tokenizer files, generation settings, chat templates, and Python files of a model with code of its own."""
    return path.is_file() and (_is_tokenizer(path) or path.name == GENERATION or path.suffix in (".py", ".jinja"))


def _tokenizer_files(stated: str, required: bool) -> dict[str, Path]:
    path = Path(stated)
    folder = path if path.is_dir() else path.parent if path.is_file() else None
    if folder is None and required:
        raise JobError("tokenizer", f"there is no {stated}", "give the folder that holds tokenizer.json")
    if folder is None:
        logger.warning("the tokenizer %s is not on this machine: add it with --tokenizer FOLDER", stated)
        return {}
    found = {file.name: file for file in folder.iterdir() if file.is_file() and _is_tokenizer(file)}
    if required and not found:
        raise JobError("tokenizer", f"{folder} holds no tokenizer files", "give the folder with tokenizer.json")
    return found


def write_companions(
    folder: Path, source: Source, files: Mapping[str, Path], dtype: str | None, *, complete: bool
) -> list[str]:
    """Copy the files, and write config.json as it was with what the weights now are.

    Args:
        dtype: of the written weights (safetensors' name); None: as the config says.
        complete: for a Hugging Face folder: special tokens and generation settings are filled in where they are
            missing. Else the config stays as it is.

    Returns:
        names of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / name)
    written = [*files, "config.json"]
    config = {"architectures": list(source.family.architectures[:1]), **source.hf_config}
    config["model_type"] = source.family.name
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = _TORCH_NAMES[dtype]
    if complete:
        config = with_special_ids(config, files)
        if GENERATION not in files:
            ids = {key: config[key] for key in SPECIAL_IDS}
            (folder / GENERATION).write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
            written.append(GENERATION)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return sorted(written)
