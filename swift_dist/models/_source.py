"""Where a model comes from: an inline config, a local folder, or a Hugging Face id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from swift_dist.config import ModelSection
from swift_dist.errors import JobError

_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


def read_hf_config(model: ModelSection) -> dict[str, Any]:
    """The model's config.json as a dict: ``model.config``, or read from ``model.path`` (folder, else hub id).

    Raises:
        JobError: no source is given, it cannot be read, or it wants Python code of its own to run (``auto_map``)
            without ``model.trust_remote_code``.
    """
    if model.config is not None:
        config, key = dict(model.config), "model.config"
    elif model.path is not None:
        config, key = _read_json(_config_file(model.path)), "model.path"
    else:
        raise JobError("model", "neither model.path nor model.config is given", "give model.path: a folder or a hub id")
    if config.get("auto_map") and not model.trust_remote_code:
        raise JobError(
            key,
            "config.json brings Python code of its own (auto_map), which is not run unless allowed",
            "set model.trust_remote_code: true if you trust its author, or use the plain version of the model",
        )
    return config


def model_folder(path: str, *, weights: bool) -> Path:
    """The local folder of a model: ``path`` itself, or a hub id's snapshot, downloaded where it is not cached.

    Args:
        weights: also the safetensors files; otherwise config, tokenizer and generation settings only.

    Raises:
        JobError: it is neither a folder nor a model that can be fetched.
    """
    folder = _local(path)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=_SMALL_FILES + (_WEIGHTS if weights else [])))
    except Exception as error:  # the hub's errors have no common base: network, permission, name, cache
        raise _not_fetched(path, error) from None


def _local(path: str) -> Path | None:
    """The folder that a path names; None: it reads like a hub id (``name`` or ``owner/name``)."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise JobError("model.path", f"{path} is a file", "give the folder that holds config.json and the weights")
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise JobError("model.path", f"there is no folder {path}", "correct the path; a hub id looks like owner/name")
    return None


def _config_file(path: str) -> Path:
    folder = _local(path)
    if folder is not None:
        file = folder / "config.json"
        if not file.is_file() and (folder / "adapter_config.json").is_file():
            remedy = f"swift-dist merge {path} DIR makes a model of it and its base; --model DIR"
            raise JobError("model.path", f"{path} is an adapter, not a model", remedy)
        if not file.is_file():
            raise JobError("model.path", f"{path} holds no config.json", "give a Hugging Face model folder")
        return file
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(path, "config.json"))
    except Exception as error:  # as in model_folder
        raise _not_fetched(path, error) from None


def _not_fetched(path: str, error: Exception) -> JobError:
    reason = str(error).strip().splitlines()
    return JobError(
        "model.path",
        f"{path} is no local folder and could not be fetched from the Hugging Face hub: "
        f"{type(error).__name__}{': ' + reason[0] if reason else ''}",
        "correct the name, log in for a gated model, or download it and give the folder",
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError("model.path", f"{file} cannot be read: {error}", "restore the file") from None
    if not isinstance(content, dict):
        raise JobError("model.path", f"{file} does not hold a JSON object", "restore the file")
    return content
