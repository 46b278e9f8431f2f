"""data.train or data.validation as one global order of samples. Needs numpy only (no torch)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from swift_dist.config.job import DataSection, DatasetEntry
from swift_dist.data.blend import Blend
from swift_dist.data.packed import PackedDataset
from swift_dist.errors import JobError, RunError

SMALLEST_SHARE = 2.0**-50
"""Of a dataset in a blend by weights; less would never be read."""


class Mixture:
    """Datasets, blended and shuffled: an order of samples that depends on (seed, data, sequence length) alone.

    Sample i of the order comes from the dataset that `Blend` names, and is that dataset's next sample in its own
    order, which is a new permutation each epoch. Shares:

    - every entry has `weight`: by weight, without end;
    - every entry has `epochs`: each dataset gives round(epochs x its samples), and `num_samples` is their sum;
    - neither: by size, without end; once every dataset has been seen e times whole, all have.

    Raises:
        JobError: no dataset, files missing or corrupt, or weights and epochs mixed.
    """

    def __init__(
        self, entries: Sequence[DatasetEntry], sequence_length: int, seed: int, key: str = "data.train"
    ) -> None:
        if not entries:
            raise JobError(
                key, "no dataset given", f"give {key}: [PREFIX, ...] as `swift-dist data prepare` wrote them"
            )
        self.key, self.sequence_length = key, sequence_length
        self.num_samples: int | None = None
        _require_one_kind(entries, key)
        self.datasets: list[PackedDataset] = []
        try:
            for entry in entries:
                self.datasets.append(PackedDataset(entry, sequence_length, seed, key))
            self._shares(entries, seed)
        except BaseException:
            self.close()
            raise

    def _shares(self, entries: Sequence[DatasetEntry], seed: int) -> None:
        sizes = [dataset.num_samples for dataset in self.datasets]
        weights = [entry.weight for entry in entries if entry.weight is not None]
        epochs = [entry.epochs for entry in entries if entry.epochs is not None]
        self._stated = [weight / sum(weights) for weight in weights] + [f"{count} epochs" for count in epochs]
        if weights:
            if min(weights) / sum(weights) < SMALLEST_SHARE:
                raise JobError(
                    self.key,
                    f"weight {min(weights):g} is no sample beside weights that sum to {sum(weights):g}",
                    "raise it, or leave that dataset out",
                )
            self.blend = Blend.from_weights(weights, seed)
            return
        if epochs:
            for k, (size, count) in enumerate(zip(sizes, epochs, strict=True)):
                sizes[k] = round(size * count)
                if sizes[k] == 0:
                    raise JobError(
                        self.key,
                        f"{count} epochs of the {size} samples of {entries[k].path} are no sample",
                        "raise epochs",
                    )
            self.num_samples = sum(sizes)
        self.blend = Blend(sizes, seed)

    def samples(self, start: int, wanted: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Some of the samples start ... start + count - 1 of the order.

        Args:
            start: first sample of a global batch; count: its size.
            wanted: int64 [k], which of them to read, as offsets from start.

        Returns:
            tokens: int64 [k, L + 1]; source: int64 [k], index of each sample's dataset.
        """
        if self.num_samples is not None and start + count > self.num_samples:
            raise RunError(
                f"{self.key} is used up: its epochs hold {self.num_samples} samples, {start + count} were asked for",
                f"lower train.steps to {self.num_samples // count} or raise epochs",
            )
        source, ordinal = self.blend.locate(start, count)
        source, ordinal = source[wanted], ordinal[wanted]
        tokens = np.empty((len(wanted), self.sequence_length + 1), dtype=np.int64)
        for k, dataset in enumerate(self.datasets):
            mine = np.flatnonzero(source == k)
            if mine.size:
                tokens[mine] = dataset.samples(ordinal[mine])
        return tokens, source

    def eod_ids(self, section: DataSection) -> np.ndarray | None:
        """int64 [datasets]: the end-of-document token of each; None: nothing in the section asks for it.

        Raises:
            JobError: a dataset does not say which it is.
        """
        keys = [name for name in ("mask_eod_loss", "separate_documents") if getattr(section, name)]
        if not keys:
            return None
        for dataset in self.datasets:
            if dataset.eod_id is None:
                raise JobError(
                    f"data.{keys[0]}",
                    f"{dataset.store.prefix}.manifest.json names no end-of-document token",
                    f"prepare the data with --append_eod true, or leave {' and '.join(keys)} out",
                )
        return np.array([dataset.eod_id for dataset in self.datasets], dtype=np.int64)

    def check_vocabulary(self, vocab_size: int) -> None:
        """See `PackedDataset.check_vocabulary`."""
        for dataset in self.datasets:
            dataset.check_vocabulary(vocab_size)

    def refuse_tokens_from(self, vocab_size: int) -> None:
        """Refuse tokens >= vocab_size in every sample read from now on."""
        for dataset in self.datasets:
            dataset.vocab_size = vocab_size

    def fingerprint(self) -> str:
        """What the data is, wherever it lies: hash of each dataset's content and share, in order."""
        parts = [dataset.store.content_hash() for dataset in self.datasets]
        return hashlib.sha256(json.dumps([parts, self._stated]).encode()).hexdigest()[:32]

    def close(self) -> None:
        for dataset in self.datasets:
            dataset.close()


def _require_one_kind(entries: Sequence[DatasetEntry], key: str) -> None:
    for entry in entries:
        if entry.weight is not None and entry.epochs is not None:
            raise JobError(key, f"{entry.path} has both weight and epochs", "give one of them")
    for name in ("weight", "epochs"):
        given = [entry for entry in entries if getattr(entry, name) is not None]
        if given and len(given) < len(entries):
            other = next(entry for entry in entries if getattr(entry, name) is None)
            raise JobError(
                key, f"{given[0].path} has {name} but {other.path} has not", f"give every dataset {name}, or none"
            )


def check_data(
    section: DataSection,
    *,
    global_batch_size: int,
    steps: int | None = None,
    vocab_size: int | None = None,
    eval_steps: int = 0,
) -> int:
    """Everything about a job's data that can be known before it starts.

    Args:
        section: the job's data section.
        global_batch_size: samples of one step.
        steps: train.steps, where given.
        vocab_size: of the model; tokens beyond it are refused.
        eval_steps: global batches of one evaluation, 0 if the job does not evaluate.

    Returns:
        The steps to train: `steps`, or what the epochs of data.train hold (a last incomplete batch is dropped).

    Raises:
        JobError: whatever is wrong, by its key.
    """
    train = Mixture(section.train, section.sequence_length, 0)
    try:
        train.eod_ids(section)
        if vocab_size is not None:
            train.check_vocabulary(vocab_size)
        steps = _steps(train.num_samples, global_batch_size, steps)
    finally:
        train.close()
    if section.validation:
        validation = Mixture(section.validation, section.sequence_length, 0, "data.validation")
        try:
            validation.eod_ids(section)
            if vocab_size is not None:
                validation.check_vocabulary(vocab_size)
            evaluation_steps(validation, global_batch_size, eval_steps)
        finally:
            validation.close()
    elif eval_steps:
        raise JobError(
            "data.validation",
            "train.eval_interval asks for evaluations but no data is given for them",
            "give data.validation: [PREFIX], or leave train.eval_interval out",
        )
    return steps


def total_steps(section: DataSection, global_batch_size: int) -> int:
    """Steps that the epochs of data.train hold.

    Raises:
        JobError: a dataset has no epochs, or the files are wrong.
    """
    return check_data(section, global_batch_size=global_batch_size)


def _steps(num_samples: int | None, global_batch_size: int, steps: int | None) -> int:
    if num_samples is None:
        if steps is None:
            raise JobError("train.steps", "is not given", "give train.steps, or epochs for every entry of data.train")
        return steps
    held = num_samples // global_batch_size
    if held == 0 or (steps is not None and steps > held):
        raise JobError(
            "train.steps",
            f"{steps or 1} steps of {global_batch_size} samples, but the epochs of data.train hold {num_samples}",
            f"lower train.steps to {held} or raise epochs" if held else "raise epochs or lower train.global_batch_size",
        )
    return steps or held


def evaluation_steps(mixture: Mixture, global_batch_size: int, eval_steps: int) -> int:
    """Global batches of one evaluation: `eval_steps`, or fewer where the data holds fewer (no sample counts twice)."""
    size = mixture.num_samples or sum(dataset.num_samples for dataset in mixture.datasets)
    if size < global_batch_size:
        raise JobError(
            mixture.key,
            f"{size} samples of {mixture.sequence_length} tokens, fewer than one global batch of {global_batch_size}",
            "give more validation data, or lower data.sequence_length or train.global_batch_size",
        )
    return min(eval_steps, size // global_batch_size)
