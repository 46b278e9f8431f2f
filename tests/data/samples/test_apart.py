"""Rows that the template takes apart into several sequences, as samples of a store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from swift_dist.config.load import build, parse_words
from swift_dist.data.preview import PreviewOptions, preview, render
from swift_dist.data.samples.encode import encode_samples
from swift_dist.data.samples.store import SampleStore
from swift_dist.workers import pool
from tests.data.samples.cases import job, write_rows
from tests.data.samples.test_encode import Inline
from tests.data.templates import tiny
from tests.data.templates.tiny import answer, user

ROWS: list[dict[str, Any]] = [
    {"messages": [user("Hi"), answer("Hello."), user("How?"), answer("Fine."), user("Bye"), answer("Bye. " * 30)]},
    {"messages": [user("Hi"), answer("Hello.")]},
    {"messages": [user("Hi"), answer("Hello. " * 30), user("How?"), answer("Fine. " * 30)]},
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pool, "LocalWorker", Inline)
    tiny.tokenizer("qwen3").save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", ROWS)
    return tmp_path


def encode(folder: Path, length: int, **template: Any) -> SampleStore:
    config = job(
        model={"path": str(folder / "model")},
        data={"train": [str(folder / "rows.jsonl")], "sequence_length": length, "workers": 1},
        template=template,
    )
    (store,) = encode_samples(config, "single", folder / "cache", progress=False)
    return store


def shown(store: SampleStore) -> list[str]:
    template = tiny.template("qwen3")
    return [tiny.shown(template, store.sequences(k)[0]) for k in range(store.num_samples)]


def test_sequences_are_samples_in_order(folder: Path) -> None:
    store = encode(folder, 4096)
    assert (store.facts["rows"], store.num_samples, store.facts["bad"]) == (3, 6, {})
    assert store.facts["apart"] == {"rows": 2, "sequences": 5}
    assert "3 rows, 6 samples" in store.summary() and "2 rows were taken apart into 5 sequences" in store.summary()
    learnt = [text[text.index("⟦") + 1 : text.index("⟧")].split("\n\n")[-1] for text in shown(store)]
    assert [text.removesuffix("<|im_end|>").strip() for text in learnt] == [
        *("Hello.", "Fine.", ("Bye. " * 30).strip(), "Hello."),
        *(("Hello. " * 30).strip(), ("Fine. " * 30).strip()),
    ]
    assert all(text.count("⟦") == 1 for text in shown(store))
    hashes = store.hashes.tolist()
    assert hashes[:3] == [hashes[0]] * 3 and hashes[4] == hashes[5] and len(set(hashes)) == 3  # sides of a split


def test_sequences_that_are_too_long_are_left_out_and_counted(folder: Path) -> None:
    whole = encode(folder, 4096)
    limit = int(whole.lengths[2]) - 1
    store = encode(folder, limit)
    kept = [text for text, length in zip(shown(whole), whole.lengths, strict=True) if length <= limit]
    assert shown(store) == kept
    listed = [row["reason"] for row in store.bad_rows()]
    assert listed[0] == f"sequence 3 of its 3: too long ({whole.lengths[2]} tokens)"
    assert {row["kind"] for row in store.bad_rows()} == {"left out"}
    left = sum(store.facts["bad"].values())
    assert store.num_samples == 6 - store.facts["apart"]["left_out"] - 2 * left
    split = encode(folder, limit // 2, truncation="split")
    assert split.num_samples > 6 and split.facts["learning_tokens"] == whole.facts["learning_tokens"]


def test_refused_where_the_job_says_so(folder: Path) -> None:
    store = encode(folder, 4096, rewritten_turns="refuse")
    assert (store.num_samples, store.facts["bad"], store.facts["apart"]) == (1, {"unusable": 2}, {})
    assert "rewritten_turns" in store.bad_rows()[0]["reason"] and "taken apart" not in store.summary()


def test_preview_shows_and_counts_them(folder: Path) -> None:
    words = [str(folder / "rows.jsonl"), "--tokenizer", str(folder / "model")]
    options = build(PreviewOptions, [parse_words(words, PreviewOptions, positional=("input...",))])
    result = preview(options)
    assert result["apart"] == {"rows": 2, "sequences": 5} and result["sequences"] == 6
    text = render(result)
    assert "conversation 2 of 3: " in text and "2 rows were taken apart into 5 sequences" in text
    json.dumps(result)
    limit = max(result["lengths"]["min"], result["shown"][0]["sequences"][1]["tokens"])
    short = preview(options.model_copy(update={"sequence_length": limit}))
    assert sum(short["reasons"].values()) == 2
    assert any(reason.startswith("one sequence of several of its row: too long") for reason in short["reasons"])
