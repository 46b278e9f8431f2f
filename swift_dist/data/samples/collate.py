"""Sequences of a micro-batch to its tensors: in one row without padding, or a row each, padded on the right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from swift_dist.data.samples.dataset import Example
from swift_dist.data.templates.base import Encoded

if TYPE_CHECKING:
    import torch

Layout = Literal["packed", "padded"]
MakeLabels = Callable[[Sequence[Any]], "torch.Tensor"]

NO_LABEL = -100
MISMATCHED = "mismatched."
"""Before the names of the tensors of KTO's mismatched answers, in the micro-batch of its answers."""
_EMPTY_TOKENS = 2  # of a sequence that only fills a batch up: attention over none would be NaN in some kernels


def empty_example(num_sequences: int, pad_id: int) -> Example:
    """A sample that only fills a batch up: nothing in it has a weight."""
    tokens = Encoded(np.full(_EMPTY_TOKENS, pad_id, np.int32), np.zeros(_EMPTY_TOKENS, np.float32))
    return Example((tokens,) * num_sequences, weight=0.0)


def _one_of(example: Example, place: int) -> Example:
    """A sample of one of its sequences."""
    return replace(example, sequences=(example.sequences[place],), number=_numbers(example)[place])


def _numbers(example: Example) -> list[int]:
    """The number of each of its sequences."""
    places = range(len(example.sequences))
    return [-1 if example.number < 0 else example.number + place for place in places]


@dataclass(frozen=True)
class Collator:
    """Makes micro-batches.

    Args:
        layout: "packed": all sequences one after the other in a row; "padded": each in a row of its own.
        pad_id: token of padding.
        pad_to_multiple: rows are padded to a multiple of this many tokens.
        classifies_tokens: labels are those of the tokens that have a weight.
        parts_mismatched: of samples of KTO: a micro-batch of the answers, and one of the mismatched ones beside it.
        make_labels: from the sequences' labels (None for those that fill up) to `sequence_labels`; None: no labels.
    """

    layout: Layout
    pad_id: int
    pad_to_multiple: int = 1
    classifies_tokens: bool = False
    parts_mismatched: bool = False
    make_labels: MakeLabels | None = None

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """One micro-batch; see `SampleData.micro_batches`."""
        if not self.parts_mismatched:
            return self._batch(examples)
        answers, mismatched = ([_one_of(example, place) for example in examples] for place in (0, 1))
        beside = {MISMATCHED + name: tensor for name, tensor in self._batch(mismatched).items()}
        return {**self._batch(answers), **beside}

    def _batch(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        import torch

        sequences = [sequence for example in examples for sequence in example.sequences]
        rows = self._rows([len(sequence) for sequence in sequences])
        shape = (max(row for row, _ in rows) + 1, self._width(rows, sequences))
        arrays: dict[str, np.ndarray] = {
            "tokens": np.full(shape, self.pad_id, np.int64),
            "labels": np.full(shape, NO_LABEL, np.int64),
            "weights": np.zeros(shape, np.float32),
            "position_ids": np.zeros(shape, np.int64),
            "segments": np.full(shape, -1, np.int64),
        }
        if self.layout == "padded":
            arrays["attention_mask"] = np.zeros(shape, np.int64)
        labels = [example.label for example in examples for _ in example.sequences]
        for number, (sequence, (row, begin)) in enumerate(zip(sequences, rows, strict=True)):
            self._place(arrays, row, begin, number, sequence, labels[number])
        if self.layout == "packed":
            used = rows[-1][1] + len(sequences[-1])
            arrays["position_ids"][0, used:] = np.arange(shape[1] - used)
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        batch["lengths"] = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
        numbers = [number for example in examples for number in _numbers(example)]
        batch["numbers"] = torch.tensor(numbers, dtype=torch.int64)
        batch["sample_weights"] = torch.tensor([example.weight for example in examples], dtype=torch.float32)
        if self.make_labels is not None and not self.classifies_tokens:
            batch["sequence_labels"] = self.make_labels(labels)
        return batch

    def _rows(self, lengths: Sequence[int]) -> list[tuple[int, int]]:
        """(row, first column) of each sequence."""
        if self.layout == "padded":
            return [(row, 0) for row in range(len(lengths))]
        return [(0, int(end) - length) for end, length in zip(np.cumsum(lengths), lengths, strict=True)]

    def _width(self, rows: Sequence[tuple[int, int]], sequences: Sequence[Encoded]) -> int:
        used = max(begin + len(sequence) for (_, begin), sequence in zip(rows, sequences, strict=True))
        return -(-used // self.pad_to_multiple) * self.pad_to_multiple

    def _place(
        self, arrays: dict[str, np.ndarray], row: int, begin: int, number: int, sequence: Encoded, label: Any
    ) -> None:
        size = len(sequence)
        here = slice(begin, begin + size)
        arrays["tokens"][row, here] = sequence.ids
        arrays["position_ids"][row, here] = np.arange(size)
        arrays["segments"][row, here] = number
        if "attention_mask" in arrays:
            arrays["attention_mask"][row, here] = 1
        if self.classifies_tokens:  # position t is classified, not the one after it
            places = np.flatnonzero(sequence.weights > 0)
            arrays["weights"][row, here] = sequence.weights
            if len(places):
                arrays["labels"][row, begin + places] = label
            return
        before = slice(begin, begin + size - 1)
        arrays["labels"][row, before] = sequence.ids[1:]
        arrays["weights"][row, before] = sequence.weights[1:]
