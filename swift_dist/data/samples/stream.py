"""Streamed rows as a rank reads them: chunks that somebody is still encoding, in the order of `stream_order`.

A chunk is a store of its own (`store.SampleStore`), which has its name when it is whole. `streaming.py` makes them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from swift_dist.config.job import JobConfig
from swift_dist.data.samples.dataset import Example, make_items
from swift_dist.data.samples.order import Item
from swift_dist.data.samples.store import (
    DamagedStoreError,
    SampleKind,
    SampleStore,
    check_labels,
    check_vocabulary,
    refuse_bad_rows,
)
from swift_dist.data.samples.stream_order import WINDOW, ChunkStream, StreamOrder
from swift_dist.data.samples.stream_status import StatusReader
from swift_dist.errors import RunError

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_TELL_AFTER_SECONDS = 2.0
_TELL_SECONDS = 60.0


@dataclass(frozen=True)
class StreamPlan:
    """What is streamed, as plain values: they travel to the ranks.

    Args:
        kind: what a sample is.
        names: of the sources; folders: of their chunks, named by content; counts: chunks of each.
        weights: shares of the sources; (): every row once in each pass.
        status: file that says how the encoding is (`stream_status`).
        vocab_size: tokens are below it; None: not known.
    """

    kind: SampleKind
    names: tuple[str, ...]
    folders: tuple[str, ...]
    counts: tuple[int, ...]
    weights: tuple[float, ...]
    status: str
    vocab_size: int | None

    def as_values(self) -> dict[str, Any]:
        return asdict(self)

    def place(self, chunk: int) -> tuple[int, int]:
        """(source, unit) of chunk number `chunk` of all."""
        ends = list(accumulate(self.counts))
        source = bisect_right(ends, chunk)
        return source, chunk - (ends[source] - self.counts[source])

    def path(self, chunk: int) -> Path:
        source, unit = self.place(chunk)
        return Path(self.folders[source]) / chunk_name(unit)

    def describe(self, chunk: int) -> str:
        """For people."""
        source, unit = self.place(chunk)
        return f"chunk {unit + 1} of {self.counts[source]} of {self.names[source]}"

    def streams(self, seed: int, num_samples: Callable[[int], int]) -> list[ChunkStream]:
        """One of all chunks, or one for each weight."""
        starts = [0, *accumulate(self.counts)]
        groups = [range(starts[-1])]
        if self.weights:
            groups = [range(start, end) for start, end in pairwise(starts)]
        return [ChunkStream(group, seed, number, num_samples, self.window) for number, group in enumerate(groups)]

    @property
    def window(self) -> int:
        """Chunks of a stream that are shuffled together: all streams' are open at once, a few files each."""
        return max(2, WINDOW // max(1, len(self.weights)))

    def fingerprint(self) -> str:
        """Identity of the rows and of what makes samples of them, and of their shares; not of paths."""
        identity = [self.kind, [Path(folder).name for folder in self.folders], list(self.weights)]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def chunk_name(unit: int) -> str:
    return f"{unit:07d}"


def check_chunk(store: SampleStore, plan: StreamPlan, job: JobConfig) -> None:
    """Hold a chunk to the job.

    Raises:
        JobError: rows that cannot be used, where that stops the job; tokens or labels that the model does not have.
    """
    refuse_bad_rows(store, job.data.bad_rows, "data.train")
    if plan.vocab_size is not None:
        check_vocabulary([store], plan.vocab_size)
    if store.num_samples and store.kind in ("classification", "token_classification") and job.model.num_labels:
        check_labels([store], job.model.num_labels, job.model.problem_type)


class Chunks:
    """The chunks of a plan, opened when they are asked for; waits for those that are not there yet.

    Args:
        job: whose labels, vocabulary and data.bad_rows every chunk is held to.

    Attributes:
        lengths: as an order of items takes them, by chunk.

    Methods raise:
        JobError: a chunk does not fit the job, or the encoding ended because the job is wrong.
        RunError: the encoding has failed or nobody does it; a chunk stays damaged; `close` was called.
    """

    def __init__(self, plan: StreamPlan, job: JobConfig) -> None:
        self.plan, self._job = plan, job
        self.lengths = _Lengths(self)
        self._status = StatusReader(Path(plan.status))
        self._closed = threading.Event()
        self._open: OrderedDict[int, SampleStore] = OrderedDict()
        self._sizes: dict[int, int] = {}
        self._labels: tuple[Any, ...] | None = None

    def size(self, chunk: int) -> int:
        """Samples of a chunk."""
        if chunk not in self._sizes:
            self.store(chunk)
        return self._sizes[chunk]

    def store(self, chunk: int) -> SampleStore:
        self._status.check(waits=False)
        if chunk not in self._open:
            store = self._wait(chunk)
            check_chunk(store, self.plan, self._job)
            self._require_one_kind(store)
            self._open[chunk], self._sizes[chunk] = store, store.num_samples
            if len(self._open) > 4 * self.plan.window * max(1, len(self.plan.weights)):
                self._open.popitem(last=False)
        self._open.move_to_end(chunk)
        return self._open[chunk]

    def _require_one_kind(self, store: SampleStore) -> None:
        """The labels of every chunk are of the same kind as those of the first."""
        if not store.num_samples:
            return
        is_regression = self._job.model.problem_type == "regression" or self._job.model.num_labels == 1
        mine = (store.facts["labels"], store.facts["labels_are_float"] and not is_regression)
        if self._labels not in (None, mine):
            raise RunError(
                f"{store.name} has rows whose labels are of another kind than those of the rows before",
                "give every row a label of one kind",
            )
        self._labels = mine

    def _wait(self, chunk: int) -> SampleStore:
        """The chunk, as soon as it is there and whole: one that is damaged is made again."""
        began, told = time.monotonic(), 0.0
        while (store := self._opened(chunk)) is None:
            self._status.check(waits=True)
            if self._closed.wait(_POLL_SECONDS):
                raise RunError("the data was closed while rows were waited for")
            waited = time.monotonic() - began
            if waited > told + (_TELL_SECONDS if told else _TELL_AFTER_SECONDS):
                told = waited
                logger.info("waiting for %s to be encoded, for %.0f s so far", self.plan.describe(chunk), waited)
        return store

    def _opened(self, chunk: int) -> SampleStore | None:
        source, _ = self.plan.place(chunk)
        path = self.plan.path(chunk)
        if not path.is_dir():
            return None
        try:
            return SampleStore(path, self.plan.names[source], verify=chunk not in self._sizes)
        except DamagedStoreError:
            return None

    def close(self) -> None:
        """End waiting."""
        self._closed.set()


class _Lengths(Mapping[int, np.ndarray]):
    """Chunk -> `SampleStore.lengths`."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks

    def __getitem__(self, chunk: int) -> np.ndarray:
        return self._chunks.store(chunk).lengths

    def __len__(self) -> int:
        return sum(self._chunks.plan.counts)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))


class StreamPart:
    """The training samples of a stream, in the order of a job: what `dataset.Part` is of whole stores."""

    def __init__(self, chunks: Chunks, job: JobConfig) -> None:
        self._chunks = chunks
        self._streams = chunks.plan.streams(job.train.seed, chunks.size)
        order = StreamOrder(self._streams, job.train.seed, chunks.plan.weights)
        self.items = make_items(order, job.train.seed, chunks.lengths, job)

    def first_store(self) -> SampleStore:
        """The first chunk that has samples."""
        chunk, _ = self._streams[0].locate(np.zeros(1, np.int64))
        return self._chunks.store(int(chunk[0]))

    def examples(self, item: Item) -> list[Example]:
        """The samples of an item."""
        out = []
        for chunk, place in item:
            store = self._chunks.store(chunk)
            out.append(Example(tuple(store.sequences(place)), store.label(place)))
        return out
