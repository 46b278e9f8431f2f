"""Vectors of the hf engine: a plain forward, pooled by hand, whatever else is asked at the same time."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
import transformers
from chat_model import save_chat_model, save_tokenizer
from generating import prompts

from swift_dist.errors import JobError
from swift_dist.serving.hf import embedding
from swift_dist.serving.hf.embedding import Embedder
from swift_dist.serving.hf.generator import started
from swift_dist.serving.hf.requests import GeneratorFailed, Sampling
from swift_dist.serving.options import EngineOptions, ServedModel

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXTS = [*prompts(9, 40), [5], [6, 7]]


def save_encoder(folder: Path, kind: str = "bert") -> Path:
    config = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}[kind]
    values = {**SIZES, "vocab_size": 336, "max_position_embeddings": 66, "pad_token_id": 1, "initializer_range": 0.2}
    save_tokenizer(folder)
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config(**values)).save_pretrained(folder)
    return folder


def served(folder: Path, **options: object) -> Embedder:
    found = started(ServedModel("vectors", str(folder), EngineOptions(task="embed", **options)))
    assert isinstance(found, Embedder)
    return found


def vectors(folder: Path, texts: list[list[int]]) -> torch.Tensor:
    embedder = served(folder)
    try:
        return torch.tensor(asyncio.run(embedder.embed(texts)))
    finally:
        embedder.close()


def expected(folder: Path, pooling: str, normalize: bool = True) -> torch.Tensor:
    """One text at a time."""
    model = transformers.AutoModel.from_pretrained(folder)
    found = []
    for text in TEXTS:
        with torch.inference_mode():
            hidden = model(torch.tensor([text])).last_hidden_state[0]
        vector = {"cls": hidden[0], "last": hidden[-1], "mean": hidden.mean(0)}[pooling]
        found.append(vector / vector.norm() if normalize else vector)
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["llama", "bert", "roberta"])
def test_vectors_are_those_of_each_text_alone(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "BATCH_TOKENS", 60)  # several batches, each with padding
    folder = save_chat_model(tmp_path / kind) if kind == "llama" else save_encoder(tmp_path / kind, kind)
    own = "last" if kind == "llama" else "cls"
    torch.testing.assert_close(vectors(folder, TEXTS), expected(folder, own), atol=1e-5, rtol=1e-4)


def sentence_modules(folder: Path, pooling: dict, *others: str) -> Path:
    kinds = ["Transformer", "Pooling", *others]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
    return folder


@pytest.mark.parametrize(
    ("said", "pooling"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_the_folder_says_how(tmp_path: Path, said: dict, pooling: str) -> None:
    folder = sentence_modules(save_encoder(tmp_path / "bert"), said)
    torch.testing.assert_close(vectors(folder, TEXTS), expected(folder, pooling, False), atol=1e-5, rtol=1e-4)
    (folder / "1_Pooling/config.json").unlink()
    (folder / "1_Pooling").rmdir()
    sentence_modules(folder, said, "Normalize")
    torch.testing.assert_close(vectors(folder, TEXTS), expected(folder, pooling), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("said", "others", "message"),
    [
        ({"pooling_mode_mean_tokens": True}, ["Dense"], "Dense"),
        ({"pooling_mode_max_tokens": True}, [], "pooling_mode_max_tokens"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}, [], "is not computed"),
        ({}, [], "is not computed"),
    ],
)
def test_what_it_says_and_cannot_be_computed_is_refused(
    tmp_path: Path, said: dict, others: list[str], message: str
) -> None:
    folder = sentence_modules(save_encoder(tmp_path / "bert"), said, *others)
    with pytest.raises(JobError, match=message):
        served(folder)


def test_limits(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "roberta", "roberta")
    embedder = served(folder)
    assert embedder.model_max_length == 64  # RoBERTa's positions begin after its padding's
    assert len(asyncio.run(embedder.embed([[5] * 64]))[0]) == 32
    for texts, message in (([[5] * 65], "65 tokens"), ([[]], "empty"), ([[336]], "no token"), ([[-1]], "no token")):
        with pytest.raises(ValueError, match=message):
            asyncio.run(embedder.embed(texts))
    with pytest.raises(ValueError, match="--task generate"):
        embedder.submit([5], Sampling())
    embedder.close()
    with pytest.raises(GeneratorFailed):
        asyncio.run(embedder.embed([[5]]))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    embedder = served(folder)
    assert embedder.model_max_length == 20
    embedder.close()
    with pytest.raises(JobError, match="adapters"):
        started(ServedModel("v", str(folder), EngineOptions(task="embed"), {"a": "b"}))


def test_many_at_once(tmp_path: Path) -> None:
    folder = save_chat_model(tmp_path / "llama")
    embedder = served(folder)

    async def every() -> list:
        return await asyncio.gather(*(embedder.embed([text]) for text in TEXTS * 3))

    found = torch.tensor(asyncio.run(every())).squeeze(1)
    assert (embedder.running, embedder.waiting) == (0, 0)
    embedder.close()
    torch.testing.assert_close(found, expected(folder, "last").repeat(3, 1), atol=1e-5, rtol=1e-4)
