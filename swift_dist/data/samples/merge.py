"""Part files of a source, in order, to a store's arrays."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from swift_dist.data.parts import as_bytes
from swift_dist.data.samples.store import BAD_ROWS, FORMAT, HEADER, SampleKind
from swift_dist.data.samples.unit_encoder import read_part
from swift_dist.data.work_folder import write_json
from swift_dist.errors import JobError


class _Column:
    """One file of the store while it grows."""

    def __init__(self, folder: Path, name: str, dtype: Any) -> None:
        self.name, self.dtype = name, np.dtype(dtype)
        self._stream: BinaryIO = (folder / name).open("wb")
        self._digest, self._bytes = xxhash.xxh3_128(), 0

    def write(self, values: np.ndarray) -> None:
        data = as_bytes(values.astype(self.dtype, copy=False))
        self._stream.write(data)
        self._digest.update(data)
        self._bytes += len(data)

    def close(self) -> dict[str, Any]:
        self._stream.close()
        return {"dtype": self.dtype.str, "bytes": self._bytes, "checksum": self._digest.hexdigest()}


def merge(
    parts: Sequence[Path],
    folder: Path,
    *,
    kind: SampleKind,
    sequence_length: int,
    key: str,
    name: str,
    paths: Sequence[str] = (),
) -> None:
    """Write a store's files; its header last.

    Args:
        parts: part files in the order of the source; folder: empty.
        key, name: the job's key and the source, for messages.
        paths: of the files that the rows were read from, as bad rows name them.

    Raises:
        JobError: rows whose labels are of different kinds, or no sample at all.
    """
    headers, plain = [], True
    for path in parts:  # two passes: the type of a column depends on all parts, which need not fit in memory together
        arrays, header = read_part(path)
        headers.append(header)
        plain = plain and arrays["weights"].dtype == np.uint8
    labels = _one_label_kind([header["label_kinds"] for header in headers], key, name)
    columns = {"tokens": "<i4", "weights": "u1" if plain else "<f4", "ends": "<i8", "hashes": "<u8"}
    if labels != "none":
        columns |= {"labels": "<f8", "label_ends": "<i8"}
    files = {column: _Column(folder, f"{column}.bin", dtype) for column, dtype in columns.items()}
    tokens = values = samples = learning = 0
    largest, lengths = -1, []
    for path in parts:
        arrays, _ = read_part(path)
        files["tokens"].write(arrays["tokens"])
        files["weights"].write(arrays["weights"])
        files["hashes"].write(arrays["hashes"])
        files["ends"].write(tokens + np.cumsum(arrays["lengths"]))
        if labels != "none":
            files["labels"].write(arrays["labels"])
            files["label_ends"].write(values + np.cumsum(arrays["num_labels"]))
        largest = max(largest, int(arrays["tokens"].max(initial=-1)))
        tokens, samples = tokens + len(arrays["tokens"]), samples + len(arrays["hashes"])
        values, learning = values + len(arrays["labels"]), learning + int((arrays["weights"] > 0).sum())
        lengths.append(arrays["lengths"])
    known = {f"{column}.bin": file.close() for column, file in files.items()}
    facts = {
        "format": FORMAT,
        "kind": kind,
        "sequence_length": sequence_length,
        "paths": list(paths),
        "rows": sum(header["rows"] for header in headers),
        "samples": samples,
        "tokens": tokens,
        "learning_tokens": learning,
        "max_token_id": largest,
        "labels": labels,
        "labels_are_float": any(header["labels_are_float"] for header in headers),
        "bad": dict(sum((Counter(header["reasons"]) for header in headers), Counter())),
        "unusable": sum(header["unusable"] for header in headers),
        "pairs": sum(header["pairs"] for header in headers),
        "apart": dict(sum((Counter(header["apart"]) for header in headers), Counter())),
        "lengths": _quantiles(np.concatenate(lengths) if lengths else np.empty(0, np.int64)),
        "files": {**known, BAD_ROWS: _write_bad_rows(folder, headers)},
    }
    write_json(folder / HEADER, facts)


def _one_label_kind(kinds: Sequence[Sequence[str]], key: str, name: str) -> str:
    found = sorted(set().union(*kinds))
    if len(found) > 1:
        raise JobError(
            key, f"{name} has labels of several kinds: {', '.join(found)}", "give every row a label of one kind"
        )
    return found[0] if found else "none"


def _write_bad_rows(folder: Path, headers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    file = _Column(folder, BAD_ROWS, "u1")
    for header in headers:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in header["bad"])
        file.write(np.frombuffer(lines.encode(), dtype=np.uint8))
    return file.close()


def _quantiles(lengths: np.ndarray) -> dict[str, int]:
    """Of the sequences' lengths, in tokens."""
    if not len(lengths):
        return {"median": 0, "p95": 0, "max": 0}
    median, p95, largest = np.quantile(lengths, [0.5, 0.95, 1.0], method="higher")
    return {"median": int(median), "p95": int(p95), "max": int(largest)}
