"""Whether a Hugging Face folder holds the model of its config."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

from swift_dist.converters.mapping import Duplicate, Row, duplicates, hf_shapes
from swift_dist.converters.stored import FLOATS, StoredTensor
from swift_dist.errors import JobError, listed

_BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$")  # files of older transformers versions hold these; computed anew
UNEQUAL_REMEDY = (
    "set tie_word_embeddings to false in config.json if the model was trained so; else get the folder again"
)


def check_hf_folder(
    tensors: Mapping[str, StoredTensor], folder: str | os.PathLike[str], rows: Iterable[Row | Duplicate], key: str
) -> list[str]:
    """Compare a folder with the rows: every tensor there, no other, each with its shape. Headers suffice.

    Args:
        key: of the option that errors name.

    Returns:
        names of what is there and is no weight (buffers of older transformers versions).

    Raises:
        JobError: names what is missing, unexpected, of another shape, or not stored as floats.
    """
    rows = tuple(rows)
    wanted = hf_shapes(rows)
    optional = {row.hf: wanted[row.of] for row in duplicates(rows) if not row.required}
    known = {**wanted, **{name: shape for name, shape in optional.items() if name in tensors}}
    ignored = sorted(name for name in tensors.keys() - known.keys() if _BUFFERS.search(name))
    unexpected = tensors.keys() - known.keys() - set(ignored)
    problems = [f"missing: {name} {list(known[name])}" for name in sorted(known.keys() - tensors.keys())]
    problems += [f"unexpected: {name} {list(tensors[name].shape)}" for name in sorted(unexpected)]
    for name in sorted(known.keys() & tensors.keys()):
        stored = tensors[name]
        if stored.shape != known[name]:
            problems.append(f"{name}: shape {list(stored.shape)}, config.json says {list(known[name])}")
        elif stored.values_dtype not in FLOATS:
            problems.append(f"{name}: stored as {stored.dtype}, not as plain floats")
    if problems:
        raise JobError(
            key,
            f"the weights in {folder} are not those of the configured model:\n  {listed(problems)}",
            "use the config.json that belongs to these weights, and a complete download",
        )
    return ignored
