"""Which samples of its stores a job uses, in which order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from swift_dist.config.job import JobConfig
from swift_dist.data.mixture import SMALLEST_SHARE
from swift_dist.data.samples.order import (
    GroupedItems,
    Item,
    Items,
    Lengths,
    Order,
    PackedItems,
    PlainItems,
    SampleOrder,
    Shares,
)
from swift_dist.data.samples.split import split_stores
from swift_dist.data.samples.store import SampleKind, SampleStore
from swift_dist.data.templates.base import Encoded
from swift_dist.errors import JobError

_VALIDATION_SEED = 0  # runs with different seeds are evaluated on the same samples


@dataclass(frozen=True)
class Example:
    """One sample of a micro-batch.

    Args:
        sequences: one or two; label: as its row says it, or of classified words the list of theirs.
        weight: 1, or 0 for a sample that only fills the batch up.
        number: of its first sequence among those of all the job's stores, which follow one another; -1: it has none.
    """

    sequences: tuple[Encoded, ...]
    label: Any = None
    weight: float = 1.0
    number: int = -1


class Part:
    """Chosen samples of some stores, in the order of a job.

    Args:
        stores: where they are; indices: int64 [samples], which of each.
        seed: of the order; shares: of the stores in it.
        starts: the number of each store's first sequence (`Example.number`).
    """

    def __init__(
        self,
        stores: Sequence[SampleStore],
        indices: Sequence[np.ndarray],
        job: JobConfig,
        seed: int,
        shares: Shares,
        starts: Sequence[int],
    ) -> None:
        self._stores, self._indices, self._starts = stores, indices, starts
        self.has_epochs = bool(shares.epochs)
        order = SampleOrder([len(index) for index in indices], seed, shares)
        lengths = [store.lengths[index] for store, index in zip(stores, indices, strict=True)]
        self.items = make_items(order, seed, lengths, job)

    def examples(self, item: Item) -> list[Example]:
        """The samples of an item."""
        out = []
        for source, place in item:
            out.append(read_example(self._stores[source], int(self._indices[source][place]), self._starts[source]))
        return out

    def numbers(self, start: int, count: int) -> np.ndarray:
        """int64, `Example.number` of every sample of items start ... start + count - 1."""
        return np.array(
            [
                self._starts[source] + int(self._indices[source][place]) * self._stores[source].sequences_per_sample
                for item in (self.items.items(start, count) if count else ())
                for source, place in item
            ],
            dtype=np.int64,
        )


def read_example(store: SampleStore, sample: int, start: int) -> Example:
    """A sample of a store whose first sequence has the number `start`."""
    number = start + sample * store.sequences_per_sample
    return Example(tuple(store.sequences(sample)), store.label(sample), number=number)


def first_numbers(stores: Sequence[SampleStore]) -> list[int]:
    """The number of each store's first sequence, and one more: of all sequences."""
    counts = [store.num_samples * store.sequences_per_sample for store in stores]
    return np.cumsum([0, *counts]).tolist()


def make_items(order: Order, seed: int, lengths: Lengths, job: JobConfig) -> Items:
    """What the job makes items of: packs, samples sorted by length, or samples as they come."""
    if job.data.packing:
        return PackedItems(order, seed, lengths, job.data.sequence_length)
    if job.data.group_by_length:
        return GroupedItems(order, seed, lengths, job.train.global_batch_size)
    return PlainItems(order)


def require_sound(job: JobConfig, kind: SampleKind) -> None:
    """What can be wrong with a job's samples before there are any.

    Raises:
        JobError: options that contradict each other, or what a sample is.
    """
    if job.template.truncation == "split" and kind != "single":
        raise JobError(
            "template.truncation", f"split makes several samples of one, which a {kind} sample cannot be", "use right"
        )
    if job.data.packing and kind in ("pair", "kto"):
        raise JobError("data.packing", f"{kind} samples are not packed", "leave data.packing out")
    if job.data.packing and job.data.group_by_length:
        raise JobError(
            "data.group_by_length", "packs are all of about the same length", "give data.packing or this, not both"
        )


def training_part(stores: Sequence[SampleStore], job: JobConfig) -> Part:
    """What is trained on.

    Raises:
        JobError: shares of the datasets that contradict each other, or a split that leaves nothing.
    """
    kept, _ = split_stores(stores, job.data.split_ratio)
    return Part(stores, kept, job, job.train.seed, _shares(stores, kept), first_numbers(stores))


def validation_part(
    stores_train: Sequence[SampleStore], stores_validation: Sequence[SampleStore], job: JobConfig
) -> Part | None:
    """What is evaluated: data.validation, or what data.split_ratio takes from data.train; None: nothing.

    Raises:
        JobError: both are given, or shares, which would be ignored.
    """
    if job.data.split_ratio and stores_validation:
        raise JobError("data.split_ratio", "data.validation is given, too", "give one of them")
    for store in stores_validation:
        if store.weight is not None or store.epochs is not None:
            raise JobError(
                "data.validation", f"{store.name} has a share, but every row counts once", "leave weight and epochs out"
            )
    stores, starts = stores_validation, first_numbers([*stores_train, *stores_validation])
    starts = starts[len(stores_train) :]
    indices = [np.arange(store.num_samples, dtype=np.int64) for store in stores]
    if job.data.split_ratio:
        stores, (_, indices) = stores_train, split_stores(stores_train, job.data.split_ratio)
        starts = first_numbers(stores_train)
    some = [k for k, index in enumerate(indices) if len(index)]
    if not some:
        return None
    chosen = [stores[k] for k in some], [indices[k] for k in some]
    return Part(*chosen, job, _VALIDATION_SEED, Shares(), [starts[k] for k in some])


def last_item(part: Part, job: JobConfig) -> int | None:
    """Where training ends: after train.epochs passes; after one, where the datasets have `epochs`; None: nowhere."""
    if job.train.epochs is not None:
        return part.items.items_in(job.train.epochs)
    return part.items.items_in(1) if part.has_epochs else None


def one_label_kind(stores: Sequence[SampleStore]) -> str:
    """ "none", "scalar" or "list".

    Raises:
        JobError: the stores' labels are of several kinds.
    """
    kinds = sorted({store.facts["labels"] for store in stores})
    if len(kinds) > 1:
        raise JobError(
            "data.train", f"the datasets have labels of several kinds: {', '.join(kinds)}", "use datasets of one kind"
        )
    return kinds[0]


def fingerprint(stores: Sequence[SampleStore]) -> str:
    """Identity of training data: content and shares, not paths. (What else decides the order are keys of the job.)"""
    identity = [[store.kind, store.fingerprint(), store.weight, store.epochs] for store in stores]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _shares(stores: Sequence[SampleStore], indices: Sequence[np.ndarray]) -> Shares:
    key = "data.train"
    weights = tuple(store.weight for store in stores if store.weight is not None)
    epochs = tuple(store.epochs for store in stores if store.epochs is not None)
    if (weights and epochs) or any(given and len(given) < len(stores) for given in (weights, epochs)):
        raise JobError(key, "some datasets have weight or epochs, which others have not", "give all the same, or none")
    if weights and min(weights) / sum(weights) < SMALLEST_SHARE:
        raise JobError(
            key, f"weight {min(weights):g} is no sample beside weights that sum to {sum(weights):g}", "raise it"
        )
    for store, index, count in zip(stores, indices, epochs, strict=False):
        if round(len(index) * count) == 0:
            raise JobError(key, f"{count:g} epochs of {store.name}'s {len(index)} samples are none", "raise epochs")
    return Shares(weights, epochs)
