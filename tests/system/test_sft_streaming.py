"""Streamed rows through the command line: waited for, without a driver, on another number of ranks; each row once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Command
from same_end import metrics
from sft_job import BATCH, ROWS, STEPS, Files, assert_same_end, newest_row, samples_seen, write_files

from swift_dist.checkpoint import open_checkpoint
from swift_dist.config.load import load_job
from swift_dist.data.samples.store_lock import FileLock
from swift_dist.data.samples.streaming import open_stream

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
Start = Callable[..., Command]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Rows with a column that nobody reads, so that they are several chunks."""
    folder = tmp_path_factory.mktemp("sft")
    plain = write_files(folder)
    rows = [{**json.loads(line), "note": "x" * 40_000} for line in Path(plain.rows).read_text().splitlines()]
    wide = folder / "wide.jsonl"
    wide.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Files(plain.model, str(wide))


def words(files: Files, output: Path, ranks: int, *more: str, steps: int = STEPS) -> list[str]:
    given = ("--streaming", "true", "--max_steps", str(steps), "--tuner_type", "lora", "--output", str(output))
    return files.words(*given, *more, ranks=ranks)


def hold_back(files: Files, output: Path) -> FileLock:
    """Encode the first chunk, and keep any run from encoding another until the lock is closed."""
    job = load_job(None, [word for word in words(files, output, 1)[1:] if word != "--json"], task="sft")
    (output.parent / ".cache").mkdir(parents=True)
    plan, _ = open_stream(job, "single", output.parent / ".cache", str(output), None)
    assert plan.counts[0] >= 6
    folder = Path(plan.folders[0])
    return FileLock(folder.with_name(f".{folder.name}.lock"), lambda: None)


@pytest.mark.table
def test_a_run_that_waits_for_rows_and_loses_its_driver(files: Files, start: Start, tmp_path: Path) -> None:
    quiet, output = tmp_path / "quiet" / "run", tmp_path / "held" / "run"
    command = start(*words(files, quiet, 2, "--launcher", "torchrun"))
    assert command.wait() == 0, command.stderr
    assert f"all rows are encoded: 8 of 8 chunks, {ROWS} rows, {ROWS} samples" in command.stderr
    lock = hold_back(files, output)
    command = start(*words(files, output, 2))
    command.until(lambda: newest_row(output) >= 1, "a step")
    log = output / "logs" / "rank_0.log"
    command.until(lambda: log.read_text().count("waiting for chunk") == 1, "a waiting rank")
    reached = newest_row(output)
    time.sleep(3)
    assert newest_row(output) == reached < STEPS and {rank.phase for rank in command.ranks()} == {"load"}
    command.process.kill()
    command.wait()
    command.assert_nothing_left()
    command = start(*words(files, output, 2))
    command.until(lambda: log.read_text().count("waiting for chunk") == 2, "a waiting rank again")
    lock.close()
    assert command.wait() == 0, command.stderr
    command.assert_nothing_left()
    assert_same_end(output, quiet)
    lines = (output / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line)["data_wait_seconds"] for line in lines) > 0.5
    seen = samples_seen(output, [2], [range(ROWS // BATCH)])
    assert len(seen) == ROWS // BATCH * BATCH and set(seen.values()) == {1}


@pytest.mark.table
def test_a_resume_on_another_number_of_ranks(files: Files, start: Start, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = start(*words(files, output, 1, "--launcher", "torchrun", steps=8))
    assert command.wait() == 0, command.stderr
    command = start(*words(files, output, 2, "--launcher", "torchrun"))
    assert command.wait() == 0, command.stderr
    assert open_checkpoint(output).step == STEPS and [row[0] for row in metrics(output)] == list(range(1, STEPS + 1))
    seen = samples_seen(output, [1, 2], [range(8), range(8, ROWS // BATCH)])
    assert len(seen) == ROWS // BATCH * BATCH and set(seen.values()) == {1}


@pytest.mark.table
def test_a_bad_row_ends_the_run_where_it_is_to(files: Files, start: Start, tmp_path: Path) -> None:
    rows = Path(files.rows).read_text().splitlines()
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text("\n".join([*rows, '{"messages": []}']) + "\n")
    given = words(Files(files.model, str(wrong)), tmp_path / "run", 1, "--data.bad_rows", "stop")
    command = start(*given, "--launcher", "torchrun")
    assert command.wait() == 2, command.stderr
    assert "data.train: 1 rows of" in command.stderr and f"wrong.jsonl:{len(rows) + 1}: " in command.stderr
    command.assert_nothing_left()
