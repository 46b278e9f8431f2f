"""What a store was made from, as its name: by content, so that a copy elsewhere finds it and a change does not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

from swift_dist.config.finetune import TemplateSection
from swift_dist.data.samples.store import FORMAT, SampleKind
from swift_dist.errors import JobError

_CODE = ("rows", "templates", "samples/unit_encoder.py", "samples/truncation.py", "readers.py", "tables.py")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json", "additional_chat_templates"),
)
_ASKS_FOR_DATE = b"strftime_now"
_TOKENIZER_PATTERNS = ("*.model", "*.tiktoken", "*.py", "*.jinja")


def tokenizer_hash(path: str, trust_remote_code: bool, date: str) -> str:
    """Of a tokenizer's files, the chat template's and the code it brings among them; of `date` where it is written.

    Args:
        path: folder, or hub id, whose files are looked up in (and fetched into) the hub's cache.
        date: ``template.date``, which a chat template may write into every conversation.

    Raises:
        JobError: it is not there.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        return _hash_of_loaded(path, trust_remote_code, date)
    if folder.is_file():
        return _digest([folder.read_bytes()])
    found = {folder / name for name in _TOKENIZER_FILES}
    found |= {file for pattern in _TOKENIZER_PATTERNS for file in folder.glob(pattern)}
    found |= {file for place in list(found) if place.is_dir() for file in place.rglob("*")}
    files = sorted(file for file in found if file.is_file())
    parts = [part for file in files for part in (str(file.relative_to(folder)).encode(), file.read_bytes())]
    if any(_ASKS_FOR_DATE in part for part in parts):
        parts.append(date.encode())
    return _digest(parts)


def _hash_of_loaded(name: str, trust_remote_code: bool, date: str) -> str:
    """Of what transformers makes of a hub id: its files lie in a cache whose layout is the hub client's own."""
    import tempfile

    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # the hub, files, versions: transformers raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise JobError("model.tokenizer", f"{name} cannot be loaded: {reason}", "give a tokenizer's folder") from None
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return tokenizer_hash(folder, trust_remote_code, date)


@cache
def _code_hash() -> str:
    """Of the code that turns rows into samples: a store made by other code is made again, never reused."""
    room = Path(__file__).parents[1]
    files = [f for name in _CODE for f in ([room / name] if name.endswith(".py") else (room / name).rglob("*.py"))]
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers")]
    return _digest([*(file.read_bytes() for file in sorted(files)), *(version.encode() for version in versions)])


def _digest(parts: list[bytes]) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _format_hash(name: str) -> str:
    """Of a format from outside (``package.module:ATTRIBUTE``): of its module, as `_code_hash` is of ours."""
    if ":" not in name:
        return ""
    found = importlib.util.find_spec(name.split(":")[0])
    return _digest([Path(found.origin).read_bytes()]) if found and found.origin else ""


def content_key(source: Any, tokenizer: str, template: TemplateSection, sequence_length: int, kind: SampleKind) -> str:
    """The name of the store of a source.

    Args:
        source: a RowSource; tokenizer: `tokenizer_hash`.
    """
    facts: dict[str, Any] = {
        "format": FORMAT,
        "source": source.fingerprint(),
        "row_format": _format_hash(source.format),
        "tokenizer": tokenizer,
        "template": template.model_dump(mode="json", exclude={"date"}),  # it is in `tokenizer` where it counts
        "sequence_length": sequence_length,
        "kind": kind,
        "code": _code_hash(),
    }
    return _digest([json.dumps(facts, sort_keys=True).encode()])
