"""What a refused command must look like: one message with key and remedy, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from swift_dist import cli


@dataclass(frozen=True)
class Wrong:
    """A wrong command and what must be said about it.

    Attributes:
        key: the key, option or file that the message starts with.
        says: parts of the message: the value, the file, what is allowed.
        remedy: a part of the remedy.
        words: after `swift-dist pretrain job.yaml --output out`.
        command: the whole command line, instead.
        sections: changes to the job file's sections.
        text: the job file itself, instead.
    """

    name: str
    key: str
    says: Sequence[str]
    remedy: str
    words: str = ""
    command: str = ""
    sections: dict[str, Any] | None = None
    text: str | None = None


def assert_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, words: list[str], wrong: Wrong, code: int = 2
) -> None:
    """Run it in this process, as people do and as scripts do (--json); `folder` must stay as it is."""
    before = contents(folder)
    capsys.readouterr()
    assert cli.main(words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert_message(err, wrong)
    assert cli.main([*words, "--json"]) == code
    out, err = capsys.readouterr()
    assert_message(err, wrong)
    assert_json(out, wrong, code)
    assert contents(folder) == before


def assert_message(stderr: str, wrong: Wrong) -> None:
    """The only message on stderr names key, value and remedy."""
    assert stderr.count("swift-dist: ") == 1 and "Traceback" not in stderr, stderr
    message = stderr[stderr.index("swift-dist: ") :]
    assert message.startswith(f"swift-dist: {wrong.key}: "), stderr
    head, _, remedy = message.partition("\n  remedy: ")
    for part in wrong.says:
        assert part in head, stderr
    assert wrong.remedy in remedy, stderr


def assert_json(stdout: str, wrong: Wrong, code: int) -> None:
    answer = json.loads(stdout)
    assert answer["exit_code"] == code
    assert answer["error"]["kind"] == "job" and answer["error"]["key"] == wrong.key
    assert wrong.remedy in answer["error"]["remedy"]
    assert all(part in answer["error"]["message"] for part in wrong.says)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, every folder with None."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}
