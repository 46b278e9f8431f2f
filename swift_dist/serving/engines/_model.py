"""What an engine must know of a model before it starts."""

from __future__ import annotations

import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

from swift_dist.errors import JobError
from swift_dist.serving.options import EngineOptions

_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def read_config(folder: str) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        JobError: there is none, or it cannot be read.
    """
    file = Path(folder) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError("model", f"{file} cannot be read: {error}", "Give a folder of a Hugging Face model.") from error
    return dict(config)


def head_size(config: dict[str, Any]) -> int | None:
    """Elements of an attention head; None where the configuration does not say it in the usual words."""
    text = config.get("text_config") or config
    if text.get("head_dim"):
        return int(text["head_dim"])
    hidden, heads = text.get("hidden_size"), text.get("num_attention_heads")
    return hidden // heads if hidden and heads else None


def check_length(config: dict[str, Any], options: EngineOptions) -> None:
    """Refuse a `max_model_len` beyond the model's positions, which an engine would find out minutes later.

    Where positions are scaled each engine has a rule of its own, and says it when it starts.

    Raises:
        JobError: it is longer.
    """
    text = config.get("text_config") or config
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    each = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # some have one per kind of layer
    scaled = any(one.get("rope_type", one.get("type", "default")) != "default" for one in each)
    own, asked = text.get("max_position_embeddings"), options.max_model_len
    if asked is not None and own and asked > own and not scaled:
        raise JobError("max_model_len", f"{asked} is more than the model's {own} positions", "lower it")


def saved_dtype(folder: str, config: dict[str, Any]) -> str | None:
    """ "float32", "bfloat16" or "float16", as the configuration says, or else as most elements are saved. None: other.

    Args:
        folder: of the model.
        config: its config.json.
    """
    for place in (config, config.get("text_config") or {}):
        said = place.get("dtype") or place.get("torch_dtype")
        if said:
            return str(said).removeprefix("torch.")
    elements: Counter[str] = Counter()
    for file in sorted(Path(folder).glob("*.safetensors"))[:1]:
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size))
        for tensor in (entry for name, entry in header.items() if name != "__metadata__"):
            begin, end = tensor["data_offsets"]
            elements[tensor["dtype"]] += end - begin
    return _NAMES.get(elements.most_common(1)[0][0]) if elements else None
