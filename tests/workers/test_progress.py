from __future__ import annotations

import io

import pytest

from swift_dist.workers import progress
from swift_dist.workers.progress import Progress


def lines(monkeypatch: pytest.MonkeyPatch, total: int, done: int, *added: dict[str, int]) -> list[str]:
    """What is printed when something is added every ten seconds."""
    seconds = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(seconds)))
    stream = io.StringIO()
    with Progress("verb", total, done, stream) as shown:
        for more in added:
            shown.add(**more)
    return stream.getvalue().splitlines()


def test_bytes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate is that of this run, not of what an earlier one had done."""
    assert lines(monkeypatch, 1000 * 10**6, 500 * 10**6, {"done_bytes": 100 * 10**6}, {}) == [
        "verb:  60%  10.0 MB/s  0:00:40 left",
        "verb:  60%  5.0 MB/s  0:01:20 left",
    ]
    assert lines(monkeypatch, 40 * 10**9, 0, {}, {"done_bytes": 25 * 10**9}) == ["verb:  62%  1.25 GB/s  0:00:12 left"]


def test_no_line_of_workers_that_start_or_of_what_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines(monkeypatch, 400, 0, {}, {}, {"done_bytes": 400}) == []
    assert lines(monkeypatch, 400, 0, {}, {}, {}, {}) == ["verb:   0%  0.0 MB/s"]


def test_text_and_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    added = {"done_bytes": 10 * 10**6, "text_bytes": 40 * 10**6, "tokens": 8 * 10**6}
    assert lines(monkeypatch, 20 * 10**6, 0, added) == ["verb:  50%  4.0 MB/s  0.80 Mtok/s  0:00:10 left"]
