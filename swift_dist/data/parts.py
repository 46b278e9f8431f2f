"""One encoded unit on disk: a part file, written whole or not at all.

Layout: an 8-byte magic, the header's length as uint64, the header as JSON, then for each split in order its documents'
lengths (int32), their keys (uint64, only where documents are shuffled) and their tokens.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from swift_dist.data.readers import BadRow

_MAGIC = b"SDPART\x00\x01"
_FRAME = struct.Struct("<8sQ")


@dataclass(frozen=True)
class SplitArrays:
    """Documents of one split, in output order: lengths int32 [n], keys uint64 [n] or [0], tokens [sum of lengths]."""

    lengths: np.ndarray
    keys: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class PartFacts:
    """What the header tells.

    Attributes:
        id: of the unit; last: whether its file ends with it.
        documents, tokens: of each split.
        shuffled: whether keys are stored.
        dtype: name of the token type.
        max_token: largest token id, -1 without tokens.
        empty: documents without any token; text_bytes: UTF-8 text read; input_bytes: see Unit.
        bad_rows: rows left out.
    """

    id: tuple[int, int]
    last: bool
    documents: tuple[int, ...]
    tokens: tuple[int, ...]
    shuffled: bool
    dtype: str
    max_token: int
    empty: int
    text_bytes: int
    input_bytes: int
    bad_rows: tuple[BadRow, ...] = field(default=())


def part_name(unit_id: tuple[int, int]) -> str:
    return f"{unit_id[0]:07d}-{unit_id[1]:07d}.part"


def as_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array, not copied if it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def write_part(folder: Path, facts: PartFacts, splits: Sequence[SplitArrays]) -> None:
    """Write a part under a name of its own and rename it when it is whole."""
    header = json.dumps(asdict(facts)).encode()
    final = folder / part_name(facts.id)
    temporary = folder / f".{final.name}.{os.getpid()}"
    try:
        with temporary.open("wb") as stream:
            stream.write(_FRAME.pack(_MAGIC, len(header)) + header)
            for split in splits:
                for array in (split.lengths, split.keys, split.tokens):
                    stream.write(as_bytes(array))
        temporary.replace(final)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


class Part:
    """A part file that is whole.

    Raises:
        ValueError: it is not (a crash of the machine, not of the process, can leave such a one).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as stream:
            frame = stream.read(_FRAME.size)
            if len(frame) < _FRAME.size or not frame.startswith(_MAGIC):
                raise ValueError(f"{path} is not a part file")
            size = _FRAME.unpack(frame)[1]
            raw = json.loads(stream.read(size))
        raw["bad_rows"] = tuple(BadRow(**row) for row in raw["bad_rows"])
        raw = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
        self.facts = PartFacts(**raw)
        self._dtype = np.dtype(self.facts.dtype)
        self._begins: list[tuple[int, int, int]] = []  # bytes at which lengths, keys and tokens of each split begin
        at = _FRAME.size + size
        for documents, tokens in zip(self.facts.documents, self.facts.tokens, strict=True):
            keys_at = at + 4 * documents
            tokens_at = keys_at + (8 * documents if self.facts.shuffled else 0)
            self._begins.append((at, keys_at, tokens_at))
            at = tokens_at + tokens * self._dtype.itemsize
        if path.stat().st_size != at:
            raise ValueError(f"{path} is cut off")

    def _read(self, begin: int, dtype: np.dtype, first: int, count: int) -> np.ndarray:
        return np.fromfile(self.path, dtype=dtype, count=count, offset=begin + first * dtype.itemsize)

    def lengths(self, split: int, first: int = 0, count: int | None = None) -> np.ndarray:
        count = self.facts.documents[split] - first if count is None else count
        return self._read(self._begins[split][0], np.dtype(np.int32), first, count)

    def keys(self, split: int, first: int = 0) -> np.ndarray:
        """A memory map: a search in it reads a few pages."""
        count = self.facts.documents[split] - first
        if count == 0:
            return np.empty(0, np.uint64)
        return np.memmap(self.path, np.uint64, "r", offset=self._begins[split][1] + 8 * first, shape=(count,))

    def tokens(self, split: int, first: int, count: int) -> np.ndarray:
        return self._read(self._begins[split][2], self._dtype, first, count)
