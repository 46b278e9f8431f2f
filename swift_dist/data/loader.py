"""What a rank feeds its engine: its micro-batches of each step.

Global batch s is samples [s GBS, (s + 1) GBS) of one global order (`mixture.py`). It is dealt out as Megatron's own
sampler does: micro-batch m takes the next MBS x DP samples, of which data-parallel rank r takes the r-th MBS. So sample
b of micro-batch m of rank r is sample  s GBS + m MBS DP + r MBS + b,  for m < GBS / (MBS DP). Whatever MBS and DP are,
the ranks of a step together see the same samples.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from swift_dist.config.job import DataSection
from swift_dist.data.mixture import Mixture, evaluation_steps
from swift_dist.data.prefetch import Prefetcher
from swift_dist.errors import JobError

if TYPE_CHECKING:
    import torch

MicroBatches = list[dict[str, "torch.Tensor"]]

_VALIDATION_SEED = 0  # runs with different seeds are evaluated on the same samples


class TrainingData:
    """The data of one data-parallel rank. Pure in (seed, data, sequence length, global batch, step).

    Args:
        section: the job's data section.
        seed: train.seed.
        global_batch_size: samples of one optimizer step over all ranks.
        micro_batch_size: samples of one forward pass of one rank.
        dp_rank, dp_size: this rank's place along the data-parallel axis.
        needs_data: False for a rank that neither embeds tokens nor computes a loss: it reads nothing, and gets as many
            batches as the others, empty ones.
        vocab_size: of the model; every batch is checked against it (see `check_vocabulary` for a look at all data).

    Attributes:
        wait_seconds: how long the last `micro_batches` call waited for its data.
        num_steps: whole steps that the data holds where every dataset has `epochs`, else None.

    Raises:
        JobError: data missing or corrupt, or a global batch that the ranks cannot share out.
    """

    def __init__(
        self,
        section: DataSection,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        needs_data: bool = True,
        vocab_size: int | None = None,
    ) -> None:
        assert 0 <= dp_rank < dp_size
        if global_batch_size % (micro_batch_size * dp_size):
            raise JobError(
                "train.global_batch_size",
                f"{global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} x "
                f"{dp_size} data-parallel ranks",
                f"use a multiple of {micro_batch_size * dp_size}",
            )
        self.section, self.global_batch_size, self.micro_batch_size = section, global_batch_size, micro_batch_size
        self._needs_data = needs_data
        per_round = micro_batch_size * dp_size
        rounds = np.arange(global_batch_size // per_round, dtype=np.int64)[:, None] * per_round
        self._mine = rounds + dp_rank * micro_batch_size + np.arange(micro_batch_size, dtype=np.int64)  # [rounds, MBS]
        self._train = Mixture(section.train, section.sequence_length, seed)
        self._validation: Mixture | None = None
        try:
            if section.validation:
                self._validation = Mixture(
                    section.validation, section.sequence_length, _VALIDATION_SEED, "data.validation"
                )
            self._eod = self._train.eod_ids(section)
            self._validation_eod = self._validation.eod_ids(section) if self._validation else None
        except BaseException:
            self._train.close()
            raise
        for mixture in (self._train, self._validation):
            if mixture is not None and vocab_size is not None:
                mixture.refuse_tokens_from(vocab_size)
        held = self._train.num_samples
        self.num_steps = None if held is None else held // global_batch_size
        self.wait_seconds = 0.0
        self._prefetch = Prefetcher(self._read_train, section.prefetch, self.num_steps)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids >= vocab_size, now (manifest or samples) and in every batch read later.

        Raises:
            JobError: such a token was found. A later one raises RunError from `micro_batches`.
        """
        self._train.check_vocabulary(vocab_size)
        if self._validation:
            self._validation.check_vocabulary(vocab_size)

    def micro_batches(self, step: int) -> MicroBatches:
        """This rank's micro-batches of step `step` (0-based).

        Returns:
            One dict per micro-batch: tokens, labels, position_ids int64 [MBS, L] and loss_mask float32 [MBS, L].
            `labels[:, t]` is the token after `tokens[:, t]`. The mask is 1, or with data.mask_eod_loss 0 where the
            input is the end-of-document token (the next document's first token cannot be foreseen), as in Megatron.
            Positions count from 0 on, with data.separate_documents anew behind each such token: a position of 0 is
            where a document begins, or what the sample holds of one.

        Raises:
            RunError: the files cannot be read any more, or the epochs are used up.
        """
        if not self._needs_data:
            return []
        begin = time.perf_counter()
        batch = self._prefetch.get(step)
        self.wait_seconds = time.perf_counter() - begin
        return batch

    def validation_batches(self, num_batches: int) -> list[MicroBatches]:
        """This rank's share of the first `num_batches` global batches of data.validation: the same at every call.

        Fewer where the data holds fewer whole batches, so that no sample counts twice. Their order does not depend on
        train.seed.

        Raises:
            JobError: no data.validation, or not one global batch of it.
        """
        if self._validation is None:
            raise JobError("data.validation", "no dataset given", "give data.validation: [PREFIX]")
        count = evaluation_steps(self._validation, self.global_batch_size, num_batches)
        if not self._needs_data:
            return [[] for _ in range(count)]
        return [self._read(self._validation, self._validation_eod, step) for step in range(count)]

    def _read_train(self, step: int) -> MicroBatches:
        return self._read(self._train, self._eod, step)

    def _read(self, mixture: Mixture, eod: np.ndarray | None, step: int) -> MicroBatches:
        rows, source = mixture.samples(step * self.global_batch_size, self._mine.reshape(-1), self.global_batch_size)
        tokens, labels = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
        mask = np.ones(tokens.shape, dtype=np.float32)
        ends = np.zeros(tokens.shape, dtype=bool) if eod is None else tokens == eod[source][:, None]
        if self.section.mask_eod_loss:
            mask[ends] = 0.0
        positions = np.tile(np.arange(self.section.sequence_length, dtype=np.int64), (len(tokens), 1))
        if self.section.separate_documents:
            positions -= _starts(ends)
        whole = {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions}
        return _split(whole, self.micro_batch_size)

    def fingerprint(self) -> str:
        """Identity of the training data: content and shares, not paths. A resume with another one is refused."""
        return self._train.fingerprint()

    def close(self) -> None:
        """End the prefetch thread and close the files."""
        self._prefetch.close()
        self._train.close()
        if self._validation:
            self._validation.close()


def _starts(ends: np.ndarray) -> np.ndarray:
    """int64 [rows, L]: where the document of each token begins, given the tokens that end one (bool [rows, L])."""
    starts = np.zeros(ends.shape, dtype=np.int64)
    starts[:, 1:] = np.where(ends[:, :-1], np.arange(1, ends.shape[1]), 0)
    return np.maximum.accumulate(starts, axis=1)


def _split(whole: dict[str, Any], size: int) -> MicroBatches:
    import torch

    rows = len(whole["tokens"])
    return [
        {name: torch.from_numpy(array[start : start + size]) for name, array in whole.items()}
        for start in range(0, rows, size)
    ]
