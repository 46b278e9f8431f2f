"""Tokenizer files: read so that every worker process gives the ids that transformers would."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift_dist.errors import JobError

# Classes that take tokenizer.json as it is; transformers builds others anew from parts of it.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_CHANGES_IDS = ("add_bos_token", "add_eos_token", "auto_map", "fix_mistral_regex")
_PROBE = ("Hello, world! 12345\n\n  def f(x):\n\treturn x  # ", "naïve Ünïcödé 漢字 текст 🙂 ", " a  b   c ", "")


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer that any process can build from `text` (its tokenizer.json, without truncation or padding).

    Attributes:
        vocab_size: ids are below it; eos_id: its end-of-text token, if it says which.
        appends_eos: whether its own template ends every text with that token.
    """

    text: str
    vocab_size: int
    eos_id: int | None
    appends_eos: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_tokenizer(path: str, eod_token: str | None = None, add_special_tokens: bool = True) -> LoadedTokenizer:
    """Load a tokenizer so that it gives the ids that transformers' AutoTokenizer gives.

    Args:
        path: a tokenizer.json, a folder, or a hub id.
        eod_token: the token that ends a text, instead of the tokenizer's own eos_token.
        add_special_tokens: whether its template will be used.

    Raises:
        JobError: there is none, it is unreadable, or it is not one that the tokenizers library runs.
    """
    from tokenizers import Tokenizer

    text, eos_token = _read(path)
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = tokenizer.get_vocab(with_added_tokens=True)
    if not ids:
        raise JobError("tokenizer", f"{path} has an empty vocabulary", "give another tokenizer")
    token = eod_token or eos_token
    if eod_token and eod_token not in ids:
        raise JobError("eod_token", f"{eod_token!r} is not in the vocabulary of {path}", "name a token that it has")
    eos_id = ids.get(token) if token else None
    ends = tokenizer.encode("a", add_special_tokens=add_special_tokens).ids[-1:]
    return LoadedTokenizer(
        text=tokenizer.to_str(),
        vocab_size=max(tokenizer.get_vocab_size(with_added_tokens=True), max(ids.values()) + 1),
        eos_id=eos_id,
        appends_eos=eos_id is not None and ends == [eos_id],
    )


def check_local_tokenizer(path: str, key: str) -> str | None:
    """Whether a tokenizer on this machine can be read; without transformers.

    Args:
        path: as the user gave it; a hub id is let through.
        key: what a message names.

    Returns:
        its sha256 as `data prepare` records it; None where that takes transformers to know.

    Raises:
        JobError: a path that does not exist, or a tokenizer.json that cannot be parsed.
    """
    place = Path(path).expanduser()
    if not place.exists():
        if path.startswith(("./", "../", "/", "~")) or path in (".", ".."):
            raise JobError(key, f"there is no {path}", "correct the path; a hub id looks like owner/name")
        return None
    if place.is_dir() and not (place / "tokenizer.json").is_file():
        return None
    try:
        if place.is_dir() and not _is_plain(place):
            _parsed(place / "tokenizer.json")
            return None
        return load_tokenizer(str(place)).sha256
    except JobError as error:
        raise JobError(key, error.message, error.remedy) from None


def _read(path: str) -> tuple[str, str | None]:
    """tokenizer.json and the name of its eos token."""
    place = Path(path).expanduser()
    file = place / "tokenizer.json" if place.is_dir() else place
    if not place.exists():
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and not path.endswith(".json"):
            return _through_transformers(path)
        raise JobError("tokenizer", f"{path} does not exist", "give a tokenizer folder, a tokenizer.json or a hub id")
    if place.is_dir() and not (file.is_file() and _is_plain(place)):
        return _through_transformers(str(place))
    text = _parsed(file)
    eos = _settings(file.parent).get("eos_token")
    return text, eos.get("content") if isinstance(eos, dict) else eos


def _parsed(file: Path) -> str:
    """The text of a tokenizer.json that the tokenizers library can read."""
    from tokenizers import Tokenizer

    try:
        text = file.read_text(encoding="utf-8")
        Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise JobError(
            "tokenizer", f"{file} is not a readable tokenizer: {reason}", "save the tokenizer again"
        ) from None
    return text


def _settings(folder: Path) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                found = json.loads((folder / name).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise JobError(
                    "tokenizer", f"{folder / name} is not readable: {error}", "save the tokenizer again"
                ) from None
            merged.update({key: value for key, value in found.items() if value is not None})
    return merged


def _is_plain(folder: Path) -> bool:
    """Whether AutoTokenizer would run this tokenizer.json as it is: then the slow import of transformers is spared."""
    settings = _settings(folder)
    if settings.get("tokenizer_class") not in _PLAIN_CLASSES or any(key in settings for key in _CHANGES_IDS):
        return False
    added = {entry.get("content") for entry in _added_tokens(folder)}
    named = [
        settings.get(key) for key in ("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens")
    ]
    named += [settings.get("extra_special_tokens"), *settings.get("added_tokens_decoder", {}).values()]
    return all(name in added for value in named for name in _names(value))


def _added_tokens(folder: Path) -> list[dict[str, Any]]:
    try:
        return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens", [])
    except (OSError, ValueError, AttributeError):
        return []


def _names(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _names(value["content"] if "content" in value else list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from _names(item)


def _through_transformers(path: str) -> tuple[str, str | None]:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the hub, files, versions: transformers raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise JobError(
            "tokenizer", f"{path} cannot be loaded: {reason}", "give a folder with a tokenizer.json"
        ) from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise JobError("tokenizer", f"{path} runs in Python only", "convert it to a fast tokenizer (tokenizer.json)")
    text = backend.to_str()
    plain = Tokenizer.from_str(text)
    plain.no_truncation()
    plain.no_padding()
    for probe in _PROBE:
        if plain.encode(probe).ids != loaded(probe)["input_ids"]:
            raise JobError(
                "tokenizer",
                f"{path} computes part of its ids in Python: its tokenizer.json gives others",
                "set tokenizer_class to PreTrainedTokenizerFast if the model was trained with tokenizer.json",
            )
    return text, loaded.eos_token
