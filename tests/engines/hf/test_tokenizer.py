"""The token that fills rows up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chat_model
import pytest
from transformers import LlamaConfig

from swift_dist.config import JobConfig
from swift_dist.engines.hf.tokenizer import choose_pad


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that pads with 1 and ends turns with 2."""
    path = tmp_path_factory.mktemp("tokenizer")
    chat_model.save_tokenizer(path)
    return path


@pytest.mark.parametrize(
    ("named", "end", "vocab", "has_tokenizer", "expected"),
    [
        (7, 2, 400, True, 7),  # config.json's own
        (None, 2, 400, True, 1),  # the tokenizer's, not the end of a turn
        (-1, 2, 400, True, 1),  # what some config.json say where they have none
        (None, [5, 6], 400, False, 5),
        (None, None, 400, False, 0),
        (None, [5, 0], 1, True, 0),  # tokens that the model has no embedding for
    ],
)
def test_a_heads_pad_is_what_whoever_loads_the_export_pads_with(
    folder: Path, tmp_path: Path, named: Any, end: Any, vocab: int, has_tokenizer: bool, expected: int
) -> None:
    model = SimpleNamespace(config=LlamaConfig(pad_token_id=named, eos_token_id=end, vocab_size=vocab))
    job = JobConfig.model_validate({"model": {"path": str(folder if has_tokenizer else tmp_path)}})
    assert choose_pad(model, job, "sequence_scores") == expected
    assert model.config.pad_token_id == expected, "it is exported"


def test_a_model_of_tokens_keeps_its_config(folder: Path) -> None:
    model = SimpleNamespace(config=LlamaConfig(pad_token_id=None, eos_token_id=2, vocab_size=400))
    job = JobConfig.model_validate({"model": {"path": str(folder)}})
    assert choose_pad(model, job, "tokens") == 0 and model.config.pad_token_id is None
