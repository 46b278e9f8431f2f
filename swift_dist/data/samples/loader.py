"""What a rank of a fine-tuning job feeds its engine: its micro-batches of each step.

Global batch s is items [s GBS, (s + 1) GBS) of one global order (`order.py`), dealt out as `data/loader.py` does:
micro-batch m takes the next MBS x DP items, of which data-parallel rank r takes the r-th MBS. The position of a run in
its data is its step. The last global batch may hold fewer items: samples of weight 0 fill it up, so that every rank has
as many micro-batches as the others; rounds in which no rank has an item are left out.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from swift_dist.config.job import JobConfig
from swift_dist.data.prefetch import Prefetcher
from swift_dist.data.samples.collate import Collator, Layout, MakeLabels, empty_example
from swift_dist.data.samples.dataset import (
    Example,
    Part,
    fingerprint,
    first_numbers,
    last_item,
    one_label_kind,
    read_example,
    require_sound,
    training_part,
    validation_part,
)
from swift_dist.data.samples.store import SEQUENCES_PER_SAMPLE, SampleKind, SampleStore
from swift_dist.data.samples.stream import Chunks, StreamPart, StreamPlan
from swift_dist.errors import JobError, RunError

if TYPE_CHECKING:
    import torch

MicroBatches = list[dict[str, "torch.Tensor"]]


class SampleData:
    """The data of one data-parallel rank. Pure in (seed, samples, sequence length, global batch, step).

    Args:
        stores_train, stores_validation: as `encode_samples` returns them.
        job: its data and train sections are read.
        sample_kind: what a sample is: the stores' kind.
        dp_rank, dp_size: this rank's place along the data-parallel axis.
        layout: "packed": a micro-batch is one row without padding; "padded": one row a sequence.
        pad_id: token of padding.
        pad_to_multiple: rows are padded to a multiple of this many tokens.
        make_labels: from the labels of a micro-batch's sequences (None for those that fill up) to `sequence_labels`.
            Default: numbers, int64, or float32 where one of them is no integer or the job says regression; lists of
            classes as bool [sequences, model.num_labels]. Those that fill up get 0.
        stream: what is trained on instead of `stores_train`, which is empty then.
        waiting: called about every second with the step whose data is waited for.

    Attributes:
        wait_seconds: how long the last `micro_batches` call waited for its data.
        num_steps: steps that train.epochs, or the `epochs` of every dataset, hold, the last one perhaps in part; None:
            the data goes on without end.

    Raises:
        JobError: a global batch that the ranks cannot share out, or options that contradict each other.
    """

    def __init__(
        self,
        stores_train: Sequence[SampleStore],
        stores_validation: Sequence[SampleStore],
        job: JobConfig,
        *,
        sample_kind: SampleKind,
        dp_rank: int,
        dp_size: int,
        layout: Layout,
        pad_id: int,
        pad_to_multiple: int = 1,
        make_labels: MakeLabels | None = None,
        stream: StreamPlan | None = None,
        waiting: Callable[[int], None] | None = None,
    ) -> None:
        stores = [*stores_train, *stores_validation]
        assert 0 <= dp_rank < dp_size and all(store.kind == sample_kind for store in stores)
        require_sound(job, sample_kind)
        self.global_batch_size, self.micro_batch_size = job.train.global_batch_size, job.train.micro_batch_size
        _check_shared_out(self.global_batch_size, self.micro_batch_size, dp_size)
        self._dp_rank, self._dp_size, self._stores_train = dp_rank, dp_size, stores_train
        self._stores, self._starts = stores, first_numbers(stores)
        self._chunks = Chunks(stream, job) if stream else None
        self._train: Part | StreamPart
        self._end: int | None = None
        if self._chunks:
            self._train = StreamPart(self._chunks, job)
        else:
            self._train = training_part(stores_train, job)
            self._end = last_item(self._train, job)
        self._validation = validation_part(stores_train, stores_validation, job)
        self.num_steps = None if self._end is None else -(-self._end // self.global_batch_size)
        self._check_steps(job.train.steps)
        self._collate = Collator(
            layout,
            pad_id,
            pad_to_multiple,
            classifies_tokens=sample_kind == "token_classification",
            parts_mismatched=sample_kind == "kto",
            make_labels=_label_maker([*self._first_chunk(), *stores], job, make_labels),
        )
        self._empty = empty_example(SEQUENCES_PER_SAMPLE[sample_kind], pad_id)
        self.wait_seconds, self._waiting = 0.0, waiting
        self._prefetch = Prefetcher(self._read_train, job.data.prefetch, self.num_steps)

    def _first_chunk(self) -> list[SampleStore]:
        return [self._train.first_store()] if isinstance(self._train, StreamPart) else []

    def _check_steps(self, steps: int | None) -> None:
        if steps is not None and self.num_steps is not None and steps > self.num_steps:
            raise JobError(
                "train.steps",
                f"{steps}, but the epochs of data.train hold {self.num_steps}",
                f"lower it to {self.num_steps}, or raise epochs",
            )

    def steps_for(self, epochs: float) -> int:
        """Steps of so many passes over the data, the last one perhaps in part."""
        return -(-self._train.items.items_in(epochs) // self.global_batch_size)

    def micro_batches(self, step: int) -> MicroBatches:
        """This rank's micro-batches of step `step` (0-based).

        Returns:
            One dict a micro-batch. Of shape [1, T] (packed) or [sequences, S] (padded):

            tokens         int64; position_ids int64, from 0 in each sequence
            labels         int64, the next token of the same sequence, -100 where there is none; of token classification
                           the class of this token, -100 where it has none
            weights        float32, weight of predicting `labels`
            segments       int64, number of the sequence in the micro-batch, -1: padding
            attention_mask int64, 1 where there is a token (padded only)

            and lengths int64 [sequences], sample_weights float32 [samples], numbers int64 [sequences] (which of all
            the job's sequences each is; -1: it fills up); where the rows have labels sequence_labels [sequences, ...].
            A pair's chosen and rejected answer stand side by side. Each sequence of a pack is a sample. Of KTO the
            mismatched answers are apart: the same tensors once more, named "mismatched.<name>".

        Raises:
            RunError: the epochs are used up.
        """
        begin, waiting = time.perf_counter(), self._waiting
        batch = self._prefetch.get(step, None if waiting is None else lambda: waiting(step))
        self.wait_seconds = time.perf_counter() - begin
        return batch

    def _read_train(self, step: int) -> MicroBatches:
        if self.num_steps is not None and step >= self.num_steps:
            raise RunError(
                f"data.train is used up: its epochs hold {self.num_steps} steps, step {step + 1} was asked for",
                f"lower train.steps to {self.num_steps} or raise the epochs",
            )
        return self._read(self._train, step, self._end)

    def validation_batches(self, num_batches: int | None = None) -> list[MicroBatches]:
        """This rank's share of the first `num_batches` global batches of the validation data (None: all of it).

        The same at every call and whatever train.seed; no sample counts twice.

        Raises:
            JobError: there is no validation data.
        """
        if self._validation is None:
            raise JobError("data.validation", "no dataset given", "give data.validation, or data.split_ratio")
        end = self._validation.items.items_in(1)
        held = -(-end // self.global_batch_size)
        count = held if num_batches is None else min(held, num_batches)
        return [self._read(self._validation, step, end) for step in range(count)]

    @property
    def first_numbers(self) -> list[int]:
        """The number of the first sequence of each store, training then validation; and one more: of all sequences."""
        return self._starts

    @property
    def sequences_per_sample(self) -> int:
        return self._stores[0].sequences_per_sample

    @property
    def num_sequences(self) -> int:
        return self._starts[-1]

    def store_identities(self) -> list[str]:
        """Of the content of each store, training then validation."""
        return [store.fingerprint() for store in self._stores]

    def numbers_used(self, steps: range, num_batches: int | None) -> np.ndarray:
        """int64, in order, the number of the first sequence of each sample that is used.

        Args:
            steps: of training; num_batches: global batches of an evaluation (None: all; 0: none).
        """
        assert isinstance(self._train, Part), "streaming.require_streamable"
        start, end = (step * self.global_batch_size for step in (steps.start, steps.stop))
        count = (end if self._end is None else min(end, self._end)) - start
        used = [self._train.numbers(start, max(0, count))]
        if self._validation is not None and num_batches != 0:
            end = self._validation.items.items_in(1)
            count = end if num_batches is None else min(end, num_batches * self.global_batch_size)
            used.append(self._validation.numbers(0, count))
        return np.unique(np.concatenate(used))

    def batches_of(self, numbers: Sequence[int]) -> MicroBatches:
        """This rank's micro-batches of some samples, dealt out as those of a step.

        Args:
            numbers: of each sample's first sequence.
        """

        def examples(position: int) -> list[Example]:
            store = bisect_right(self._starts, numbers[position]) - 1
            start, width = self._starts[store], self._stores[store].sequences_per_sample
            return [read_example(self._stores[store], (numbers[position] - start) // width, start)]

        return self._dealt(len(numbers), examples)

    def _read(self, part: Part | StreamPart, step: int, end: int | None) -> MicroBatches:
        start = step * self.global_batch_size
        count = self.global_batch_size if end is None else min(self.global_batch_size, end - start)
        items = part.items.items(start, count)
        assert len(items) == count
        return self._dealt(count, lambda position: part.examples(items[position]))

    def _dealt(self, count: int, examples_at: Callable[[int], list[Example]]) -> MicroBatches:
        """This rank's share of `count` items; every rank gets as many micro-batches."""
        batches = []
        for first in range(0, count, self.micro_batch_size * self._dp_size):
            mine = first + self._dp_rank * self.micro_batch_size
            examples: list[Example] = []
            for position in range(mine, mine + self.micro_batch_size):
                examples += examples_at(position) if position < count else [self._empty]
            batches.append(self._collate(examples))
        return batches

    def fingerprint(self) -> str:
        """Identity of the training data: content and shares, not paths. A resume with another one is refused."""
        return self._chunks.plan.fingerprint() if self._chunks else fingerprint(self._stores_train)

    def close(self) -> None:
        """End the prefetch thread."""
        if self._chunks:
            self._chunks.close()  # the thread may wait for rows
        self._prefetch.close()


def _check_shared_out(size: int, micro: int, dp_size: int) -> None:
    if size % (micro * dp_size):
        raise JobError(
            "train.global_batch_size",
            f"{size} is not a multiple of micro_batch_size {micro} x {dp_size} data-parallel ranks",
            f"use a multiple of {micro * dp_size}",
        )


def _label_maker(stores: Sequence[SampleStore], job: JobConfig, given: MakeLabels | None) -> MakeLabels | None:
    """What makes `sequence_labels`; None where the rows have none, or have them for each token.

    Raises:
        JobError: the rows name several classes each, and nothing says how many there are.
    """
    kind = one_label_kind(stores)
    if kind == "none" or stores[0].kind == "token_classification":
        return None
    if given is not None:
        return given
    num_labels = job.model.num_labels
    if kind == "list" and num_labels is None:
        raise JobError("model.num_labels", "is not given, and rows have lists as labels", "give model.num_labels")
    is_regression = job.model.problem_type == "regression" or num_labels == 1
    are_float = is_regression or any(store.facts["labels_are_float"] for store in stores)

    def make(labels: Sequence[Any]) -> torch.Tensor:
        import torch

        if kind == "scalar":
            values = [0 if label is None else label for label in labels]
            return torch.tensor(values, dtype=torch.float32 if are_float else torch.int64)
        assert num_labels is not None
        if are_float:
            rows = [[0.0] * num_labels if label is None else label for label in labels]
            return torch.tensor(rows, dtype=torch.float32)
        applies = torch.zeros((len(labels), num_labels), dtype=torch.bool)
        for row, label in enumerate(labels):
            applies[row, label or []] = True
        return applies

    return make
