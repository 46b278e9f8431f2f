"""A prepared dataset seen as samples of fixed length.

The .bin is one stream of T tokens, documents in file order (`data prepare` shuffles them). Sample k of sequence length
L is tokens [k L, k L + L] of it: L inputs and, shifted by one, L labels; neighbours share one token, documents run into
each other, at most L tokens at the end are never seen. The trade-off: which documents share a sample is settled once,
when the data is prepared, instead of anew each epoch; in return no index has to be built, stored or held, at any
corpus size, and the order of samples is still another one each epoch (`order.py`).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from swift_dist.config.job import DatasetEntry
from swift_dist.data.manifest import read_manifest
from swift_dist.data.order import Permutation
from swift_dist.data.store import TokenStore
from swift_dist.errors import JobError, RunError

_SCAN_BLOCKS, _SCAN_TOKENS = 256, 1 << 16  # what `largest_token` reads where no manifest tells it


class PackedDataset:
    """Samples of one dataset, in epoch order.

    Args:
        entry: path (prefix) of the dataset.
        sequence_length: tokens of one sample, L.
        seed: of the order.
        key: configuration key that error messages name.

    Raises:
        JobError: files missing or corrupt, or fewer than L + 1 tokens.
    """

    def __init__(self, entry: DatasetEntry, sequence_length: int, seed: int, key: str) -> None:
        self.store, self.length, self.key = TokenStore(entry.path, key), sequence_length, key
        self.num_samples = max(0, self.store.num_tokens - 1) // sequence_length
        if self.num_samples == 0:
            tokens = self.store.num_tokens
            self.store.close()
            raise JobError(
                key,
                f"{entry.path} has {tokens} tokens, fewer than one sample of {sequence_length + 1}",
                "use a shorter data.sequence_length or more data",
            )
        self.manifest = read_manifest(entry.path)
        self.vocab_size: int | None = None
        self._epoch = lru_cache(maxsize=4)(lambda epoch: Permutation(self.num_samples, seed, epoch))

    @property
    def eod_id(self) -> int | None:
        """The end-of-document token that was appended to every document, where the manifest tells."""
        return self.manifest.get("eod_id") if self.manifest else None

    def samples(self, ordinals: np.ndarray) -> np.ndarray:
        """Samples by their place in this dataset's own endless order: ordinal o is place o mod n of epoch o div n.

        Args:
            ordinals: int64 [count].

        Returns:
            int64 [count, L + 1].

        Raises:
            RunError: the file cannot be read, or holds a token beyond the vocabulary given to `check_vocabulary`.
        """
        out = np.empty((len(ordinals), self.length + 1), dtype=np.int64)
        epochs, places = np.divmod(ordinals, self.num_samples)
        for epoch in np.unique(epochs):
            rows = np.flatnonzero(epochs == epoch)
            for row, sample in zip(rows, self._epoch(int(epoch))(places[rows]).tolist(), strict=True):
                out[row] = self.store.read(sample * self.length, self.length + 1)
        if self.vocab_size is not None and out.size and (out.max() >= self.vocab_size or out.min() < 0):
            bad = out.max() if out.max() >= self.vocab_size else out.min()
            raise RunError(
                f"{self.store.bin} holds token {bad}, outside the model's vocabulary of {self.vocab_size}",
                "prepare the data with the model's own tokenizer",
            )
        return out

    def largest_token(self) -> int:
        """Largest token id: exact from the manifest, else the largest in up to 16 M tokens read in even blocks."""
        if self.manifest and isinstance(self.manifest.get("max_token_id"), int):
            return self.manifest["max_token_id"]
        total, largest = self.store.num_tokens, 0
        blocks = -(-total // _SCAN_TOKENS)
        chosen = range(blocks) if blocks <= _SCAN_BLOCKS else np.linspace(0, blocks - 1, _SCAN_BLOCKS, dtype=np.int64)
        for block in chosen:
            start = int(block) * _SCAN_TOKENS
            largest = max(largest, int(self.store.read(start, min(_SCAN_TOKENS, total - start)).max()))
        return largest

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse tokens >= vocab_size now (see `largest_token`), and in every sample read from now on.

        A parallel embedding maps such a token to a vector of zeros without a word.
        """
        largest = self.largest_token()
        if largest >= vocab_size:
            raise JobError(
                self.key,
                f"{self.store.bin} holds token {largest}, outside the model's vocabulary of {vocab_size}",
                "prepare the data with the model's own tokenizer",
            )
        self.vocab_size = vocab_size

    def close(self) -> None:
        self.store.close()
