"""Part files to .bin and .idx, in the order of the input or shuffled; memory is bounded, whatever the corpus."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from swift_dist.data.parts import Part, as_bytes
from swift_dist.data.store import write_index

_PIECE_TOKENS = 1 << 22  # copied at once
_BUCKET_BYTES = 1 << 28  # tokens of one bucket of an external shuffle, on average


class _HashingWriter:
    """A file that knows the sha256 of what was written to it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._digest, self.size = stream, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        self._stream.write(data)
        self._digest.update(data)
        self.size += len(data)

    def facts(self) -> dict[str, int | str]:
        return {"bytes": self.size, "sha256": self._digest.hexdigest()}


def merge(parts: Sequence[Part], split: int, dtype: np.dtype, shuffle: bool, bin_file: Path, idx_file: Path) -> dict:
    """Write one split's .bin and .idx, flushed to disk.

    Args:
        parts: all part files, in order.
        split: index of the split.
        dtype: token type; shuffle: by the documents' keys, else in order.

    Returns:
        ``{"bin": {"bytes", "sha256"}, "idx": {...}}``.

    Raises:
        OSError: the disk is full, or the files cannot be written.
    """
    documents = sum(part.facts.documents[split] for part in parts)
    lengths_file = idx_file.with_suffix(".lengths")
    pieces = _shuffled(parts, split, dtype) if shuffle else _in_order(parts, split)
    with bin_file.open("wb") as raw, lengths_file.open("wb") as lengths_stream:
        writer = _HashingWriter(raw)
        for lengths, tokens in pieces:
            lengths.tofile(lengths_stream)
            if tokens.size:
                writer.write(as_bytes(tokens))
        _flush(raw)
    outputs = {"bin": writer.facts()}
    lengths = np.memmap(lengths_file, dtype=np.int32, mode="r") if documents else np.empty(0, np.int32)
    assert len(lengths) == documents
    with idx_file.open("wb") as raw:
        writer = _HashingWriter(raw)
        write_index(writer, lengths, dtype.type)  # type: ignore[arg-type]
        _flush(raw)
    lengths_file.unlink()
    return {**outputs, "idx": writer.facts()}


def _flush(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _in_order(parts: Sequence[Part], split: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for part in parts:
        lengths, total = part.lengths(split), part.facts.tokens[split]
        for first in range(0, total, _PIECE_TOKENS):
            yield lengths, part.tokens(split, first, min(_PIECE_TOKENS, total - first))
            lengths = lengths[:0]
        yield lengths, np.empty(0, np.uint16)  # what had no tokens at all


def _shuffled(parts: Sequence[Part], split: int, dtype: np.dtype) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Documents sorted by their keys: an external bucket sort.

    Each part holds its documents sorted. Bucket b takes the documents whose keys lie in the b-th even slice of the key
    range, which is one run of each part, and is sorted in memory. Equal keys keep the order of the input.
    """
    total = sum(part.facts.tokens[split] for part in parts) * dtype.itemsize
    buckets = max(1, -(-total // _BUCKET_BYTES))
    at = [(0, 0)] * len(parts)  # documents and tokens of each part that are written
    for bucket in range(buckets):
        end = None if bucket == buckets - 1 else np.uint64((bucket + 1) * 2**64 // buckets)
        lengths, keys, tokens = [], [], []
        for k, part in enumerate(parts):
            first, first_token = at[k]
            part_keys = part.keys(split, first)
            count = len(part_keys) if end is None else int(np.searchsorted(part_keys, end, side="left"))
            part_lengths = part.lengths(split, first, count)
            num_tokens = int(part_lengths.sum(dtype=np.int64))
            lengths.append(part_lengths)
            keys.append(np.array(part_keys[:count]))
            tokens.append(part.tokens(split, first_token, num_tokens))
            at[k] = (first + count, first_token + num_tokens)
        yield _sort(np.concatenate(lengths), np.concatenate(keys), np.concatenate(tokens))


def _sort(lengths: np.ndarray, keys: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(keys, kind="stable")
    ends = np.cumsum(lengths, dtype=np.int64)
    bounds = zip((ends - lengths)[order].tolist(), ends[order].tolist(), strict=True)
    pieces = [tokens[begin:end] for begin, end in bounds]
    return lengths[order], np.concatenate(pieces) if pieces else tokens
