"""`swift-dist infer` of a dataset through vLLM: killed, gone on with, and with an engine whose core is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from chat_model import WORDS, save_rows
from openai_reference import reference, save_model, whole
from process_tree import gone_within

from swift_dist.lifetime import descendants
from swift_dist.serving.engines.choose import find_engine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a start of vLLM takes minutes on a busy machine
    pytest.mark.skipif(find_engine("vllm").why_not() is not None, reason="vLLM is not installed"),
]
MAIN = [sys.executable, "-c", "from swift_dist.cli import main; raise SystemExit(main())", "infer"]
TOKENS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


def begin(model: Path, given: list[dict[str, Any]], folder: Path, *more: str) -> subprocess.Popen[str]:
    data, out = save_rows(folder / "rows.jsonl", given), folder / "out.jsonl"
    words = ["--model", model, "--infer_backend", "vllm", "--dtype", "fp32", "--cpu_cache_gib", "0.25"]
    words += ["--dataset", data, "--output", out, "--max_tokens", TOKENS, "--temperature", "0", "--json", *more]
    words += ["--engine_args=--enforce-eager"]  # it compiles first without
    return subprocess.Popen(
        [*MAIN, *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answered(command: subprocess.Popen[str], folder: Path, number: int) -> None:
    """Wait until so many rows have their answer."""
    partial, deadline = folder / "out.jsonl.partial", time.monotonic() + 400
    while not (partial.exists() and partial.read_bytes().count(b"\n") > number):
        assert command.poll() is None, command.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def check_answers(model: Path, given: list[dict[str, Any]], folder: Path) -> None:
    """Every row once, in its place, with transformers' own greedy answer."""
    plain, found = reference(model), rows_of(folder)
    assert [row["id"] for row in found] == [row["id"] for row in given]
    for row in found:
        tokens = plain.greedy(plain.prompt([{"role": "user", "content": row["query"]}]), TOKENS)
        assert whole(row["response"]).strip() == plain.text(tokens).strip(), row


def test_a_killed_batch_goes_on(model: Path, tmp_path: Path) -> None:
    given = [
        {"query": f"the {word} {number}", "id": 16 * number + k} for number in range(5) for k, word in enumerate(WORDS)
    ]
    first = begin(model, given, tmp_path, "--concurrency", "2")
    answered(first, tmp_path, 5)
    family = [first.pid, *descendants(first.pid)]
    first.kill()
    first.communicate()
    assert gone_within(family, 10) and not (tmp_path / "out.jsonl").exists()
    lines = (tmp_path / "out.jsonl.partial").read_text().splitlines()[1:]
    kept = [json.loads(line)["row"] for line in lines if line.endswith("}")]
    second = begin(model, given, tmp_path)
    said, log = second.communicate(timeout=400)
    assert second.returncode == 0, log
    result = json.loads(said)
    assert result["rows"] == len(given) and result["failed"] == 0
    assert result["answered"] == len(given) - len(kept) < len(given) - 4
    check_answers(model, given, tmp_path)
    assert {row["id"]: row for row in rows_of(tmp_path)}.items() >= {row["id"]: row for row in kept}.items()


@pytest.mark.table
def test_an_engine_core_that_is_killed_loses_no_row(model: Path, tmp_path: Path) -> None:
    given = [
        {"query": f"the {word} {number}", "id": 16 * number + k} for number in range(10) for k, word in enumerate(WORDS)
    ]
    command = begin(model, given, tmp_path, "--concurrency", "4")
    answered(command, tmp_path, 10)
    family = descendants(command.pid)
    (core,) = [pid for pid in family if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(core, signal.SIGKILL)
    said, log = command.communicate(timeout=600)
    assert command.returncode == 0, log
    assert json.loads(said)["restarts"] == 1 and json.loads(said)["failed"] == 0
    check_answers(model, given, tmp_path)
    assert gone_within(family, 10)
