"""`data prepare` killed at any moment and started again: nothing doubled, nothing lost, nothing half-written."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from swift_dist.data import preparation
from swift_dist.data.prepare import PrepareOptions, prepare
from swift_dist.errors import JobError
from tests.data.corpora import compress, files, jsonl, megatron, texts

COMMAND = [sys.executable, "-c", "from swift_dist.cli import main; raise SystemExit(main())", "data", "prepare"]


def options(source: Path, output: Path, tokenizer: str, **more: object) -> PrepareOptions:
    given = {"input": [str(source)], "output": str(output), "tokenizer": tokenizer, "workers": 1}
    return PrepareOptions.model_validate({**given, **more})


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "unit_size", lambda found: 1500)


class Killed(BaseException):
    """Stands for a SIGKILL inside this process."""


def interrupt_after(units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = preparation.run_all

    def limited(take, workers, seen):
        left = [units]

        def count(facts):
            if facts is not None:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            seen(facts)

        plain(take, workers, count)

    monkeypatch.setattr(preparation, "run_all", limited)


@pytest.mark.usefixtures("inline_workers", "small_units")
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_second_run_goes_on(tmp_path: Path, tokenizer: str, suffix: str) -> None:
    documents = texts(300)
    source = tmp_path / f"c.jsonl{suffix}"
    source.write_bytes(compress(jsonl(documents), suffix))
    reference = megatron(tmp_path / "ref", documents, tokenizer)
    patch = pytest.MonkeyPatch()
    for units in (0, 1, 5):
        interrupt_after(units, patch)
        with pytest.raises(Killed):
            prepare(options(source, tmp_path / "out", tokenizer))
        patch.undo()
        patch.setattr(preparation, "unit_size", lambda found: 1500)
        assert not list(tmp_path.glob("out.[bi]*"))
    kept = len(list((tmp_path / "out.work" / "parts").glob("*.part")))
    assert kept >= 6
    # a part that a machine crash cut off, and one that was being written
    part = sorted((tmp_path / "out.work" / "parts").glob("*.part"))[1]
    part.write_bytes(part.read_bytes()[:-1])
    (part.parent / f".{part.name}.123").write_bytes(b"half")
    result = prepare(options(source, tmp_path / "out", tokenizer, workers=2))
    patch.undo()
    assert result["resumed_units"] == kept - 1
    assert files(tmp_path / "out") == reference
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.bin", "out.idx", "out.manifest.json"]


@pytest.mark.usefixtures("inline_workers", "small_units")
def test_another_command_does_not_take_up_the_work(tmp_path: Path, tokenizer: str) -> None:
    source = tmp_path / "c.jsonl"
    source.write_bytes(jsonl(texts(300)))
    patch = pytest.MonkeyPatch()
    interrupt_after(3, patch)
    with pytest.raises(Killed):
        prepare(options(source, tmp_path / "out", tokenizer))
    patch.undo()
    for changes, name in (({"append_eod": True}, r"options\.append_eod"), ({"seed": 3}, r"options\.seed")):
        with pytest.raises(JobError, match=f"interrupted run that differs in .*{name}") as caught:
            prepare(options(source, tmp_path / "out", tokenizer, **changes))
        assert "--overwrite true" in caught.value.remedy
    documents = texts(301)
    source.write_bytes(jsonl(documents))
    with pytest.raises(JobError, match="differs in inputs"):
        prepare(options(source, tmp_path / "out", tokenizer))
    prepare(options(source, tmp_path / "out", tokenizer, overwrite=True))
    assert files(tmp_path / "out") == megatron(tmp_path / "ref", documents, tokenizer)


@pytest.mark.parametrize("steps", range(8))
def test_killed_between_the_renames(tmp_path: Path, tokenizer: str, steps: int) -> None:
    """The process ends without a word after so many of the renames that publish the output."""
    documents = [f"document {k}" for k in range(60)]
    source = tmp_path / "c.jsonl"
    source.write_bytes(jsonl(documents))
    code = f"""
import os
from pathlib import Path
from swift_dist.data import work_folder
from swift_dist.data.prepare import PrepareOptions, prepare
plain = work_folder.WorkFolder._rename
def broken(self, todo):
    plain(self, {{"remove": todo["remove"], "rename": todo["rename"][:{steps}]}})
    os._exit(9)
work_folder.WorkFolder._rename = broken
prepare(PrepareOptions(input=({str(source)!r},), output={str(tmp_path / "out")!r}, tokenizer={tokenizer!r},
                       workers=1, split=(0.5, 0.5)))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    for name in ("train", "validation"):  # an .idx is there only when all of its dataset is
        if (tmp_path / f"out_{name}.idx").exists():
            assert (tmp_path / f"out_{name}.bin").exists() and (tmp_path / f"out_{name}.manifest.json").exists()
    result = prepare(options(source, tmp_path / "out", tokenizer, split=(0.5, 0.5)))
    assert result["already_done"] and result["documents"] == 60
    prepare(options(source, tmp_path / "ref", tokenizer, split=(0.5, 0.5)))
    for name in ("train", "validation"):
        assert files(tmp_path / f"out_{name}") == files(tmp_path / f"ref_{name}")
    assert not (tmp_path / "out.work").exists()


def workers_of(parent: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if (process.info["cmdline"] or [])[-2:] == ["swift_dist.workers.process", str(parent)]:
            found.append(process)
    return found


def start(words: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background may ignore it
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", ["plain", "shuffled splits of a compressed file"])
def test_killed_ten_times_at_random_moments(tmp_path: Path, tokenizer: str, case: str) -> None:
    """SIGKILL at ten moments, start-up and merge among them, then completion: every byte as if undisturbed."""
    draw = random.Random(case)
    documents = texts(12000, longest=400)
    suffix = "" if case == "plain" else ".zst"
    source = tmp_path / f"c.jsonl{suffix}"
    source.write_bytes(compress(jsonl(documents), suffix))
    extra = [] if case == "plain" else ["--shuffle", "--split", "0.9,0.1"]
    words = [str(source), "--tokenizer", tokenizer, "--workers", "2", "--append_eod", *extra]
    reference, output = tmp_path / "reference", tmp_path / "output"
    begin = time.monotonic()
    undisturbed = start([*words, "--output", str(reference)])
    assert undisturbed.wait() == 0, undisturbed.stderr and undisturbed.stderr.read()
    duration = time.monotonic() - begin

    kills, resumed = 0, 0
    merging = {3, 6, 9}  # those kills wait for the merge
    while kills < 10:
        run = start([*words, "--output", str(output)])
        moment = draw.uniform(0.05, max(0.3, duration * 0.6))
        deadline = time.monotonic() + (moment if kills not in merging else 60)
        while time.monotonic() < deadline and run.poll() is None:
            if kills in merging and list(output.parent.glob("output.work/merged/*")):
                time.sleep(draw.uniform(0, 0.02))
                break
            time.sleep(0.002)
        if run.poll() is not None:  # it was done before it could be killed: another round
            assert run.returncode == 0, run.stderr and run.stderr.read()
            assert_same(tmp_path, case)
            for path in tmp_path.glob("output*"):
                path.unlink()
            continue
        run.send_signal(signal.SIGKILL)
        run.wait()
        kills += 1
        resumed += any((tmp_path / "output.work" / "parts").glob("*.part"))
        if list(tmp_path.glob("output*.idx")) and not (tmp_path / "output.work" / "publish.json").exists():
            assert_same(tmp_path, case)  # it was published already
        deadline = time.monotonic() + 60  # a worker inside a write ends when the disk has taken it
        while workers_of(run.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not workers_of(run.pid)
    last = start([*words, "--output", str(output)])
    assert last.wait() == 0, last.stderr and last.stderr.read()
    assert resumed >= 3
    assert_same(tmp_path, case)
    assert not (tmp_path / "output.work").exists()


def assert_same(folder: Path, case: str) -> None:
    for name in ("",) if case == "plain" else ("_train", "_validation"):
        assert files(folder / f"output{name}") == files(folder / f"reference{name}")


def test_ctrl_c_leaves_nothing_running(tmp_path: Path, tokenizer: str) -> None:
    source = tmp_path / "c.jsonl"
    source.write_bytes(jsonl(texts(8000, longest=400)))
    run = start([str(source), "--tokenizer", tokenizer, "--workers", "2", "--output", str(tmp_path / "out")])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(tmp_path.glob("out.work/parts/*.part")):
        time.sleep(0.02)
    assert len(workers_of(run.pid)) == 2
    os.kill(run.pid, signal.SIGINT)
    assert run.wait(timeout=30) == 130
    assert run.stderr and "Traceback" not in run.stderr.read()
    assert not workers_of(run.pid)
    assert not list(tmp_path.glob("out.[bi]*"))
