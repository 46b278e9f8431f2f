"""Samples on disk: a folder of plain arrays, written once, opened as memory maps by every rank.

    tokens.bin   int32 [tokens], the sequences one after the other
    weights.bin  uint8 [tokens] where every weight is 0 or 1, else float32 [tokens]
    ends.bin     int64 [sequences], where each sequence ends in the two above
    hashes.bin   uint64 [samples], of the content of the row that a sample was made of (`split.py`)
    labels.bin   float64 [values], label_ends.bin int64 [samples]; only where the rows have labels
    bad_rows.jsonl  the rows that were left out, ``{"row": "path:line", "reason": ..., "why": ...}`` each
    store.json   what is in there: counts, types, sizes and checksums

A sample is one sequence, or two that lie side by side: a pair's chosen and rejected answer; of KTO an answer and
a mismatched one. The folder gets its name when it is whole, so there is never half a store.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from swift_dist.data.templates.base import Encoded
from swift_dist.errors import JobError, listed

FORMAT = 1
HEADER = "store.json"
BAD_ROWS = "bad_rows.jsonl"
_BLOCK = 1 << 24

SampleKind = Literal["single", "pair", "kto", "classification", "token_classification"]
SEQUENCES_PER_SAMPLE: dict[SampleKind, int] = {
    "single": 1,
    "pair": 2,
    "kto": 2,
    "classification": 1,
    "token_classification": 1,
}


def checksum(path: Path) -> str:
    """xxh3-128 of a file's content."""
    import xxhash

    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


class DamagedStoreError(ValueError):
    """A store that is not what its header says."""


class SampleStore:
    """Read access to one store; pickled by its arguments.

    Args:
        path: its folder.
        name: of the source, for messages.
        weight, epochs: the source's share in the mixture, as the job states it (`DatasetEntry`).
        verify: also read every file and compare its checksum (sizes are always compared).

    Attributes:
        kind: what a sample is; sequence_length: no sequence is longer; num_samples; num_tokens.
        max_token_id: the largest token.
        facts: the header, with rows, samples, `bad` (reason -> rows) and the quantiles of `summary`.

    Raises:
        DamagedStoreError: a file is missing, cut off or changed.
    """

    def __init__(
        self,
        path: str | Path,
        name: str = "",
        weight: float | None = None,
        epochs: float | None = None,
        verify: bool = False,
    ) -> None:
        self.path, self.name, self.weight, self.epochs = Path(path), name or str(path), weight, epochs
        try:
            self.facts: dict[str, Any] = json.loads((self.path / HEADER).read_text())
            self.kind: SampleKind = self.facts["kind"]
            self.sequence_length: int = self.facts["sequence_length"]
            self.num_samples: int = self.facts["samples"]
            self.num_tokens: int = self.facts["tokens"]
            self.max_token_id: int = self.facts["max_token_id"]
            files, version = self.facts["files"], self.facts["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedStoreError(f"{self.path / HEADER} cannot be read: {error}") from None
        if version != FORMAT:
            raise DamagedStoreError(f"{self.path} is of format {version}, only {FORMAT} is known")
        self._check(files, verify)
        self._tokens, self._weights = self._map("tokens"), self._map("weights")
        self._ends = self._map("ends")

    def arguments(self) -> dict[str, Any]:
        """What it was opened with, as plain values."""
        return {"path": str(self.path), "name": self.name, "weight": self.weight, "epochs": self.epochs}

    def __reduce__(self) -> tuple:
        return type(self), tuple(self.arguments().values())

    def _check(self, files: dict[str, dict[str, Any]], verify: bool) -> None:
        for name, known in files.items():
            file = self.path / name
            size = file.stat().st_size if file.is_file() else -1
            if size != known["bytes"]:
                what = f"{size} bytes instead of {known['bytes']}" if size >= 0 else "missing"
                raise DamagedStoreError(f"{file} is {what}")
            if verify and checksum(file) != known["checksum"]:
                raise DamagedStoreError(f"{file} is not what was written: its checksum differs")

    def _map(self, name: str) -> np.ndarray:
        known = self.facts["files"][f"{name}.bin"]
        dtype = np.dtype(known["dtype"])
        if known["bytes"] == 0:
            return np.empty(0, dtype)
        mapped = np.memmap(self.path / f"{name}.bin", dtype=dtype, mode="r", shape=(known["bytes"] // dtype.itemsize,))
        return mapped.view(np.ndarray)  # slices of a memmap cost ten times as much

    @property
    def sequences_per_sample(self) -> int:
        return SEQUENCES_PER_SAMPLE[self.kind]

    @property
    def has_labels(self) -> bool:
        return self.facts["labels"] != "none"

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32 [num_samples]: tokens of each sample, of both its sequences where it has two."""
        ends = self._ends[self.sequences_per_sample - 1 :: self.sequences_per_sample]
        return np.diff(ends, prepend=0).astype(np.int32)

    @cached_property
    def hashes(self) -> np.ndarray:
        """uint64 [num_samples]: of the content of the row that each sample was made of."""
        return self._map("hashes")

    def sequences(self, sample: int) -> list[Encoded]:
        """The one or two sequences of a sample."""
        count, out = self.sequences_per_sample, []
        for number in range(sample * count, (sample + 1) * count):
            begin = int(self._ends[number - 1]) if number else 0
            span = slice(begin, int(self._ends[number]))
            out.append(Encoded(self._tokens[span], self._weights[span].astype(np.float32)))
        return out

    def label(self, sample: int) -> Any:
        """As the row says it: a number or a list of numbers; None where rows have none."""
        if not self.has_labels:
            return None
        values, ends = self._labels
        begin = int(ends[sample - 1]) if sample else 0
        found = values[begin : int(ends[sample])]
        found = found.tolist() if self.facts["labels_are_float"] else found.astype(np.int64).tolist()
        return found[0] if self.facts["labels"] == "scalar" else found

    @property
    def largest_label(self) -> int:
        """The largest class; -1 without labels."""
        return int(self._labels[0].max(initial=-1)) if self.has_labels else -1

    @cached_property
    def _labels(self) -> tuple[np.ndarray, np.ndarray]:
        return self._map("labels"), self._map("label_ends")

    def fingerprint(self) -> str:
        """Identity of the samples: of their content, wherever they lie and whatever made them."""
        import xxhash

        files = {name: known["checksum"] for name, known in self.facts["files"].items() if name != BAD_ROWS}
        return xxhash.xxh3_128(json.dumps([self.kind, files], sort_keys=True).encode()).hexdigest()

    def bad_rows(self, paths: Sequence[str] = ()) -> list[dict[str, str]]:
        """The rows that were left out, in the order of the files (`BAD_ROWS`).

        Args:
            paths: of the source's files as they are now: a store is found by content, and the job that made it may have
                read copies elsewhere, which the file names.
        """
        with (self.path / BAD_ROWS).open(encoding="utf-8") as stream:
            rows = [json.loads(line) for line in stream]
        now = dict(zip(self.facts["paths"], paths, strict=bool(paths)))
        for row in rows:
            path, colon, place = row["row"].rpartition(":")
            row["row"] = now.get(path, path) + colon + place
        return rows

    def summary(self) -> str:
        """One line for people."""
        facts = self.facts
        lengths, bad = facts["lengths"], facts["bad"]
        reasons = ", ".join(f"{count} {reason}" for reason, count in bad.items())
        left_out = f" ({sum(bad.values())} left out: {reasons})" if bad else ""
        return (
            f"{self.name}: {facts['rows']} rows{left_out}, {self.num_samples} samples, {self.num_tokens} tokens; "
            f"{self._taken_apart()}{chosen_alone(facts['pairs'])}"
            f"length {lengths['median']} median, {lengths['p95']} p95, {lengths['max']} max; "
            f"{facts['learning_tokens'] / max(1, self.num_tokens):.1%} of the tokens learn"
        )

    def _taken_apart(self) -> str:
        """Of rows that the template gives several sequences (`Template.encode_all`)."""
        apart = self.facts["apart"]
        if not apart:
            return ""
        left_out = f" ({apart['left_out']} left out)" if apart.get("left_out") else ""
        return f"{apart['rows']} rows were taken apart into {apart['sequences']} sequences{left_out}; "


def chosen_alone(pairs: int) -> str:
    """For people, of so many pairs that samples of one answer are made of; "" of none."""
    return f"{pairs} rows are pairs, of which the chosen answers are learnt (rlhf compares both); " if pairs else ""


def listed_unusable(store: SampleStore, paths: Sequence[str] = ()) -> str:
    """The first rows that cannot be used, a line each; `paths` as in `SampleStore.bad_rows`."""
    rows = store.bad_rows(paths)
    return listed(f"{row['row']}: {row['reason']}" for row in rows if row["kind"] == "unusable")


def refuse_bad_rows(store: SampleStore, policy: str, key: str, paths: Sequence[str] = ()) -> None:
    """
    Raises:
        JobError: ``data.bad_rows: stop``, and rows of the store cannot be used.
    """
    if policy == "stop" and store.facts["unusable"]:
        raise JobError(
            key,
            f"{store.facts['unusable']} rows of {store.name} cannot be used\n  {listed_unusable(store, paths)}",
            "correct them, or data.bad_rows: skip leaves them out",
        )


def check_labels(
    stores: Sequence[SampleStore], num_labels: int, problem_type: str | None = None, key: str = "data.train"
) -> None:
    """Refuse labels that the model's head has no output for, or that are not what the job says they are.

    Args:
        stores: of kind "classification" or "token_classification".
        num_labels: outputs of the head; a single one for a whole sequence is a number to regress to.
        problem_type: ``model.problem_type``; None: by the labels.

    Raises:
        JobError: names the label, or the contradiction.
    """
    for store in stores:
        if store.kind == "classification" and _problem(store, num_labels, problem_type, key) == "regression":
            continue
        largest = store.largest_label
        if largest >= num_labels or (store.kind == "classification" and num_labels == 1):
            raise JobError(
                key,
                f"{store.name} has class {largest}, but the model has {num_labels} outputs, for classes 0 to "
                f"{num_labels - 1}",
                f"--num_labels {max(largest, 1) + 1}, or correct the rows",
            )


def _problem(store: SampleStore, num_labels: int, problem_type: str | None, key: str) -> str:
    """What the labels of whole sequences are, in transformers' words."""
    if store.facts["labels"] == "list":
        found, what = "multi_label_classification", "a list of classes"
    elif store.facts["labels_are_float"]:
        found, what = "regression", "a number that is no class"
    elif num_labels == 1 or problem_type == "regression":
        found, what = "regression", f"a number, for a model with {num_labels} outputs"
    else:
        found, what = "single_label_classification", "a class"
    if problem_type not in (None, found):
        raise JobError(
            "model.problem_type",
            f"{problem_type}, but each row of {store.name} has {what} ({found})",
            f"--model.problem_type {found}, or correct {key}",
        )
    if found == "regression" and num_labels != 1:
        raise JobError(
            "model.num_labels", f"{num_labels}, but each row of {store.name} has one number", "--num_labels 1"
        )
    return found


def check_vocabulary(stores: Sequence[SampleStore], vocab_size: int, key: str = "data.train") -> None:
    """Refuse tokens that the model has no embedding for.

    Raises:
        JobError: a store holds a token >= vocab_size.
    """
    for store in stores:
        if store.max_token_id >= vocab_size:
            raise JobError(
                key,
                f"{store.name} has token {store.max_token_id}, the model's vocabulary has {vocab_size}",
                "give model.tokenizer: the model's own tokenizer",
            )
