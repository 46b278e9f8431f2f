"""The work on one unit: read its documents, tokenise them, write the part file. Runs inside a worker process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from swift_dist.data.order import document_keys
from swift_dist.data.parts import PartFacts, SplitArrays, write_part
from swift_dist.data.readers import BadRow, Document, documents
from swift_dist.data.sources import ReadOptions
from swift_dist.data.units import Unit

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BATCH_CHARACTERS = 1 << 17  # tokenised at once: small enough that ids stay in cache, large enough to be a batch
_BATCH_DOCUMENTS = 512


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a unit's part file holds, and where it goes.

    Attributes:
        tokenizer: its tokenizer.json as text; eod_id: appended to every document unless None.
        add_special_tokens: let the tokenizer add what its template says (such as BOS).
        dtype: name of the token type.
        split: upper ends of each split's share of [0, 1], the last one 1.
        shuffle: whether documents are shuffled; seed: of that and of the split.
        parts: folder of the part files.
    """

    read: ReadOptions
    tokenizer: str
    eod_id: int | None
    add_special_tokens: bool
    dtype: str
    split: tuple[float, ...]
    shuffle: bool
    seed: int
    parts: str

    def start(self) -> Callable[[Unit], PartFacts]:
        """The recipe is the task of the workers (`workers.pool.Task`)."""
        return Encoder(self).encode


class Encoder:
    """Encodes units by one recipe. Its process must not run tokenizers in threads of its own (RAYON_NUM_THREADS=1)."""

    def __init__(self, recipe: Recipe) -> None:
        from tokenizers import Tokenizer

        self.recipe = recipe
        self._tokenizer: Tokenizer = Tokenizer.from_str(recipe.tokenizer)
        self._dtype = np.dtype(recipe.dtype)

    def encode(self, unit: Unit) -> PartFacts:
        """Write the part file of a unit.

        Raises:
            OSError: it cannot be read or written.
        """
        work = _UnitWork(self._tokenizer, self.recipe, self._dtype)
        work.take(documents(unit, self.recipe.read))
        splits = work.split()
        facts = PartFacts(
            id=unit.id,
            last=unit.last,
            documents=tuple(len(split.lengths) for split in splits),
            tokens=tuple(len(split.tokens) for split in splits),
            shuffled=self.recipe.shuffle,
            dtype=self.recipe.dtype,
            max_token=max((int(split.tokens.max()) for split in splits if split.tokens.size), default=-1),
            empty=work.empty,
            text_bytes=work.text_bytes,
            input_bytes=unit.input_bytes,
            bad_rows=tuple(work.bad_rows),
        )
        write_part(Path(self.recipe.parts), facts, splits)
        return facts


class _UnitWork:
    """The arrays of one unit while they grow."""

    def __init__(self, tokenizer: Tokenizer, recipe: Recipe, dtype: np.dtype) -> None:
        self._tokenizer, self._recipe, self._dtype = tokenizer, recipe, dtype
        self._tokens: list[np.ndarray] = []
        self._lengths: list[int] = []
        self._files: list[int] = []
        self._positions: list[int] = []
        self.bad_rows: list[BadRow] = []
        self.empty = self.text_bytes = 0

    def take(self, rows: Iterable[Document | BadRow]) -> None:
        batch: list[Document] = []
        characters = 0
        for row in rows:
            if isinstance(row, BadRow):
                self.bad_rows.append(row)
                continue
            batch.append(row)
            characters += len(row.text)
            if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
                self._encode(batch)
                batch, characters = [], 0
        if batch:
            self._encode(batch)

    def _encode(self, batch: list[Document]) -> None:
        texts = [document.text for document in batch]
        self.text_bytes += sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=self._recipe.add_special_tokens)
        ids = [encoding.ids for encoding in encodings]
        self.empty += sum(not row for row in ids)
        if self._recipe.eod_id is not None:
            for row in ids:
                row.append(self._recipe.eod_id)
        lengths = [len(row) for row in ids]
        self._tokens.append(np.fromiter(chain.from_iterable(ids), self._dtype, sum(lengths)))
        self._lengths += lengths
        self._files += [document.file.index for document in batch]
        self._positions += [document.position for document in batch]

    def split(self) -> list[SplitArrays]:
        """The documents by split, within each in the order of their keys (shuffled) or of the input."""
        recipe = self._recipe
        tokens = np.concatenate(self._tokens) if self._tokens else np.empty(0, self._dtype)
        lengths = np.array(self._lengths, dtype=np.int32)
        keys = self._keys("document order") if recipe.shuffle else np.empty(0, np.uint64)
        if len(recipe.split) == 1 and not recipe.shuffle:
            return [SplitArrays(lengths, keys, tokens)]
        chosen = np.zeros(len(lengths), dtype=np.int64)
        if len(recipe.split) > 1:
            place = self._keys("split") / 2.0**64
            chosen = np.minimum(np.searchsorted(recipe.split, place, side="right"), len(recipe.split) - 1)
        ends = np.cumsum(lengths, dtype=np.int64)
        out = []
        for k in range(len(recipe.split)):
            mine = np.flatnonzero(chosen == k)
            if recipe.shuffle:
                mine = mine[np.argsort(keys[mine], kind="stable")]
            bounds = zip((ends[mine] - lengths[mine]).tolist(), ends[mine].tolist(), strict=True)
            pieces = [tokens[begin:end] for begin, end in bounds]
            gathered = np.concatenate(pieces) if pieces else tokens[:0]
            out.append(SplitArrays(lengths[mine], keys[mine] if recipe.shuffle else keys, gathered))
        return out

    def _keys(self, purpose: str) -> np.ndarray:
        files = np.array(self._files, dtype=np.int64)
        return document_keys(self._recipe.seed, purpose, files, np.array(self._positions, dtype=np.int64))
