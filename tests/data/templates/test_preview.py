"""`data preview`: real files, a real tokenizer's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from swift_dist import cli
from swift_dist.config.load import build, parse_words
from swift_dist.data.preview import PreviewOptions, preview, render
from swift_dist.errors import JobError
from tests.data.templates.tiny import answer, system, tokenizer, user

ROWS: list[dict[str, Any]] = [
    {"messages": [user("Hi"), answer("Hello.")]},
    {"messages": [user("你好 🙂"), answer("很好 🙂", loss=0.5)]},
    {"messages": [system("Be brief."), user("How?")]},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer("chatml").save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return tmp_path


def options(folder: Path, *words: str) -> PreviewOptions:
    given = [str(folder / "rows.jsonl"), "--tokenizer", str(folder / "model"), *words]
    return build(PreviewOptions, [parse_words(given, PreviewOptions, positional=("input...",))])


def test_rows_are_shown_and_counted(folder: Path):
    result = preview(options(folder))
    assert (result["rows"], result["formats"], result["kinds"]) == (3, {"messages": 3}, {"conversation": 2})
    assert result["sequences"] == 2 and sum(result["reasons"].values()) == 1
    shown = result["shown"][0]["sequences"][0]
    assert shown["tokens"] == result["lengths"]["min"] == len(shown["pieces"])
    text = render(result)
    assert "\x1b" not in text
    assert "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n" in text
    assert "你好 🙂<|im_end|>\n<|im_start|>assistant\n⟦0.5: 很好 🙂<|im_end|>⟧\n" in text
    (reason,) = result["reasons"]
    assert f"1 are left out:\n  1: {reason} ({folder / 'rows.jsonl'}:3)" in text
    assert f"rows.jsonl:1 conversation: {shown['tokens']} tokens, " in text
    json.dumps(result)


def test_terminal_has_colours(folder: Path, monkeypatch: pytest.MonkeyPatch):
    result = preview(options(folder, "--rows", "1", "--count", "1"))
    assert result["rows"] == 1
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = render(result)
    assert "\x1b[2m<|im_start|>" in text
    assert "32m<|im_end|>" in text  # green, perhaps underlined


def test_template_keys_and_truncation(folder: Path):
    result = preview(options(folder, "--template.system", "Be brief.", "--count", "1"))
    text = render(result)
    assert "<|im_start|>system\nBe brief.<|im_end|>\n" in text
    whole = result["lengths"]["max"]
    short = str(whole - 1)
    assert preview(options(folder, "--template.system", "Be brief.", "--count", "1", "--sequence_length", short))[
        "reasons"
    ] == {f"too long ({whole} tokens)": 1}
    split = preview(
        options(folder, *("--sequence_length", "12"), *("--template.truncation", "split"), *("--count", "1"))
    )
    assert len(split["shown"][0]["sequences"]) == split["sequences"] >= 1
    assert split["lengths"]["max"] <= 12
    with pytest.raises(JobError, match="has no effect"):
        preview(options(folder, "--template.truncation", "split"))


def test_pairs_and_classes(folder: Path):
    rows = [
        {"messages": [user("Hi"), answer("Hello.")], "rejected_response": "Go away."},
        {"text": "hello", "label": 1},
    ]
    for row, kind, names in zip(rows, ("pair", "classified"), (["chosen", "rejected"], [""]), strict=True):
        (folder / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        result = preview(options(folder))
        assert result["kinds"] == {kind: 1}, result["reasons"]
        assert [sequence["name"] for sequence in result["shown"][0]["sequences"]] == names


def test_chat_template_without_exact_masks_is_refused(folder: Path):
    (folder / "model" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(JobError, match="leaves the answer out"):
        preview(options(folder))


def test_a_length_has_the_name_that_it_has_in_a_job(folder: Path, capsys: pytest.CaptureFixture[str]):
    words = [str(folder / "rows.jsonl"), "--tokenizer", str(folder / "model"), "--max_length", "6", "--json"]
    assert cli.main(["data", "preview", *words]) == 0
    assert "too long" in capsys.readouterr().out
