"""Which tokens begin, end and pad a text: from the tokenizer files that travel with exported weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swift_dist.errors import JobError

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def with_special_ids(hf_config: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, Any]:
    """The config with the ids that it does not state itself taken from the tokenizer.

    An id that nobody names is stated as null: transformers would fill in the family's default, an ordinary token of
    another tokenizer.

    Args:
        files: the tokenizer's files by name.

    Raises:
        JobError: one of the files cannot be read.
    """
    found = special_ids(files)
    stated = {key: hf_config[key] for key in SPECIAL_IDS if hf_config.get(key) is not None}
    return {**hf_config, **found, **stated}


def special_ids(files: Mapping[str, Path]) -> dict[str, int | None]:
    """bos_token_id, eos_token_id and pad_token_id by tokenizer_config.json (or special_tokens_map.json)."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if name in files:
            settings.update({key: value for key, value in _object(files[name]).items() if value is not None})
    ids = {entry.get("content"): int(i) for i, entry in settings.get("added_tokens_decoder", {}).items()}
    tokenizer = _tokenizer(files["tokenizer.json"]) if "tokenizer.json" in files else None
    found: dict[str, int | None] = {}
    for key in SPECIAL_IDS:
        token = settings.get(key.removesuffix("_id"))
        token = token.get("content") if isinstance(token, dict) else token
        number = tokenizer.token_to_id(token) if tokenizer and token else None
        found[key] = number if number is not None else ids.get(token)
    return found


def _tokenizer(file: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises bare Exception
        raise _damaged(file, error) from None


def _object(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> JobError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return JobError("tokenizer", f"{file} cannot be read: {reason}", "give a whole one: --tokenizer FOLDER")
