from __future__ import annotations

from collections import deque

import pytest

from swift_dist.data.encoder import Encoder, Recipe
from swift_dist.data.parts import PartFacts
from swift_dist.data.tokenizer import TrainTokenizerOptions, train_tokenizer
from swift_dist.data.units import Unit
from swift_dist.workers import pool
from swift_dist.workers.process import as_error
from tests.data.corpora import texts


class InlineWorker:
    """A worker of `data prepare` without a process of its own."""

    def __init__(self, recipe: Recipe) -> None:
        self._encoder, self._units = Encoder(recipe), deque[Unit]()

    def submit(self, unit: Unit) -> None:
        self._units.append(unit)

    def result(self) -> PartFacts:
        try:
            return self._encoder.encode(self._units.popleft())
        except Exception as error:
            raise as_error(error) from error

    def close(self) -> None:
        self._units.clear()


@pytest.fixture
def inline_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "LocalWorker", InlineWorker)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small byte-level BPE with an eos token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "corpus.txt").write_text("\n\n".join(texts(200, seed=99)), encoding="utf-8")
    options = TrainTokenizerOptions(input=(str(folder / "corpus.txt"),), output=str(folder / "bpe"), vocab_size=600)
    return train_tokenizer(options)["output"]
