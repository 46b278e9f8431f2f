"""Conversions as real processes that are killed, interrupted, crowded out of the disk and begun twice.

What appears under the target's name is whole, and what was whole before is not written again.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.convert.commands import (
    Command,
    contents,
    recorded,
    report,
    result_of,
    run,
    work_folder,
    write_llama,
)

VERB = "hf-to-megatron"
KILLS = 10


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """About 330 MB."""
    folder = tmp_path_factory.mktemp("large")
    yield write_llama(folder / "model", 1024, 12, 8192)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 17 MB."""
    return write_llama(tmp_path_factory.mktemp("small") / "model", 512, 2)


@pytest.fixture(scope="module")
def whole(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model converted without interruption, in files of 1 MB."""
    target = tmp_path_factory.mktemp("whole") / "checkpoint"
    result_of(VERB, small, target, "--max_shard_size", "1MB")
    return target


def stats(folder: Path, names: list[str]) -> dict[str, tuple[int, int]]:
    found = {name: (folder / name).stat() for name in names}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


def equal(got: Path, expected: Path) -> None:
    """The same files with the same bytes, and the same facts about them."""
    ours, theirs = report(got), report(expected)
    for key in ("target_hashes", "source_hashes", "non_finite", "files", "bytes"):
        assert ours[key] == theirs[key], key
    assert contents(got) == contents(expected)


def moments(files: int, seconds: float, draw: random.Random) -> list[tuple[str, float]]:
    """When to kill, in order: seconds after the start, then so many files after they are whole (plus a little)."""
    early = [("seconds", 0.02), ("seconds", seconds * draw.uniform(0.1, 0.5)), ("seconds", seconds * 0.8)]
    counts = sorted(draw.sample(range(2, files), KILLS - len(early) - 2))
    return [*early, *(("files", count) for count in (1, *counts, files))]


@pytest.mark.slow
def test_killed_at_ten_moments(large: Path, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    words = (VERB, large, tmp_path / "killed", "--max_shard_size", "16MB", "--workers", "2")
    reference, target = tmp_path / "reference", tmp_path / "killed"
    first = Command(VERB, large, reference, *words[3:])
    began = time.monotonic()
    assert first.wait_for(lambda: recorded(reference))
    until_first = time.monotonic() - began
    assert first.end()[0] == 0
    files = report(reference)["files"]
    assert len(files) > 15
    kept: dict[str, tuple[int, int]] = {}
    killed = 0
    for kind, when in moments(len(files), until_first, draw):
        command = Command(*words)
        began = time.monotonic()
        if kind == "seconds":
            reached = command.wait_for(lambda: time.monotonic() - began > when)  # noqa: B023
        else:
            reached = command.wait_for(lambda: len(recorded(target)) >= when)  # noqa: B023
            time.sleep(draw.uniform(0, 0.02))
        command.process.kill()
        code = command.end()[0]
        assert code in (-signal.SIGKILL, 0)
        last = kind == "files" and when == len(files)  # it may meet the end: renamed, not yet gone; checked below
        if code == 0 or (last and target.exists()):
            for name in (".lock", ".plan.json", ".written.jsonl") if code else ():
                (target / name).unlink(missing_ok=True)  # a kill in the instant after the rename leaves them
            break
        killed += reached
        assert not target.exists()
        now = recorded(target)
        assert kept.keys() <= set(now)
        assert stats(work_folder(target), list(kept)) == kept
        kept = stats(work_folder(target), now)
    assert killed >= KILLS - 1  # the last one, after all files, may come too late
    if not target.exists():
        resumed = result_of(*words)["resumed_files"]
        assert resumed == len(kept) and resumed >= len(files) - 1
    assert stats(target, list(kept)) == kept
    assert not work_folder(target).exists()
    equal(target, reference)
    assert run("verify", large, target, "--logits", "never")[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_interrupted(small: Path, whole: Path, tmp_path: Path, number: signal.Signals) -> None:
    target = tmp_path / "target"
    words = (VERB, small, target, "--max_shard_size", "1MB", "--workers", "1")
    command = Command(*words)
    assert command.wait_for(lambda: len(recorded(target)) >= 2)
    command.send(number)
    code, out, err = command.end()
    assert code == 130 and out == ""
    done = recorded(target)
    message = f"swift-dist: interrupted: the same command goes on with the {len(done)} files that are whole"
    assert err.splitlines() == [message]
    assert not target.exists()
    before = stats(work_folder(target), done)
    assert result_of(*words)["resumed_files"] == len(done) >= 2
    assert stats(target, done) == before
    equal(target, whole)


def test_ctrl_c_before_a_file_is_whole_leaves_nothing(small: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    command = Command(VERB, small, target)
    assert command.wait_for(lambda: list(work_folder(target).glob("*.distcp")))
    command.send(signal.SIGINT)
    assert command.end()[0] == 130
    assert recorded(target) or not list(tmp_path.iterdir())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A small file system; called again with another size, it is resized."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def sized(size: str) -> Path:
        remount = "remount," if folder.is_mount() else ""
        words = ["mount", "-t", "tmpfs", "-o", f"{remount}size={size}", "tmpfs", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        return folder

    yield sized
    if folder.is_mount():
        subprocess.run(["umount", "-l", folder], check=True)


def fill_up(disk: Path, leave: int) -> Path:
    """Take all but `leave` bytes of a file system."""
    ballast = disk / "ballast"
    with ballast.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(disk).free - leave)
    return ballast


def test_a_disk_that_is_known_to_be_too_small(
    disk: Callable[[str], Path], small: Path, whole: Path, tmp_path: Path
) -> None:
    target = disk("8m") / "target"
    words = (VERB, small, target, "--max_shard_size", "1MB")
    code, _, err = run(*words)
    assert code == 1 and "the disk is full" in err and "are needed" in err and "Traceback" not in err
    assert not list(target.parent.iterdir())
    disk("64m")
    assert result_of(*words)["resumed_files"] == 0
    equal(target, whole)


@pytest.mark.parametrize("leave", [3 << 20, "weights"])
def test_a_disk_that_fills_up_meanwhile(
    disk: Callable[[str], Path], small: Path, whole: Path, leave: int | str, tmp_path: Path
) -> None:
    """Room for a few files of weights; or for all weights, and not for what is written after them."""
    target = disk("64m") / "target"
    words = (VERB, small, target, "--max_shard_size", "1MB", "--workers", "1")
    command = Command(*words)
    files = report(whole)["files"]
    assert command.wait_for(lambda: (work_folder(target) / files[-1]).exists())
    weights = sum(-(-(whole / name).stat().st_size // 4096) for name in files) * 4096
    room = leave if isinstance(leave, int) else weights + 16384
    written = sum(path.stat().st_blocks * 512 for path in work_folder(target).glob("*.distcp"))
    ballast = fill_up(target.parent, room - written)
    code, _, err = command.end()
    assert code == 1 and "the disk is full" in err and "free space and repeat the command" in err
    assert len(err.splitlines()) == 2 and not target.exists()
    assert run(*words)[0] == 1 and not target.exists()  # it is still full
    done = recorded(target)
    before = stats(work_folder(target), done)
    ballast.unlink()
    assert result_of(*words)["resumed_files"] == len(done)  # none, if there was no room to note that one is whole
    assert stats(target, done) == before
    equal(target, whole)


def test_an_existing_target_is_not_touched(small: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for taken in (target, tmp_path / "file"):
        code, _, err = run(VERB, small, taken)
        assert code == 2 and f"{taken} exists" in err
    code, _, err = run(VERB, small, tmp_path / "file" / "below")
    assert code == 2 and "cannot write to" in err
    assert {path.name: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == dict.fromkeys(
        ("mine", "file"), "mine"
    )


@pytest.mark.parametrize("files", [0, 3])
def test_two_at_the_same_time(small: Path, whole: Path, tmp_path: Path, files: int) -> None:
    """The second is refused and leaves the work of the first alone, whether a file of it is whole or none."""
    target = tmp_path / "target"
    words = (VERB, small, target, "--max_shard_size", "1MB", "--workers", "1")
    first = Command(*words)
    assert first.wait_for(lambda: (work_folder(target) / "__0_0.distcp").exists() and len(recorded(target)) >= files)
    first.send(signal.SIGSTOP)
    before = sorted(path.name for path in work_folder(target).iterdir())
    try:
        code, _, err = run(*words)
        assert code == 2 and f"another conversion is writing {target}" in err
        assert sorted(path.name for path in work_folder(target).iterdir()) == before
    finally:
        first.send(signal.SIGCONT)
    assert first.end()[0] == 0
    equal(target, whole)


def killed_after(files: int, small: Path, target: Path) -> None:
    command = Command(VERB, small, target, "--max_shard_size", "1MB", "--workers", "1")
    assert command.wait_for(lambda: (work_folder(target) / "__0_0.distcp").exists() and len(recorded(target)) >= files)
    command.process.kill()
    assert command.end()[0] == -signal.SIGKILL


def test_another_command_does_not_go_on_with_the_work(small: Path, whole: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(small, source)
    killed_after(2, source, target)
    done = recorded(target)
    before = stats(work_folder(target), done)
    for more, named in ((("--dtype", "fp32"), "dtype"), (("--max_shard_size", "2MB"), "max_shard_size")):
        code, _, err = run(VERB, source, target, "--max_shard_size", "1MB", *more)
        assert code == 2 and f"holds an interrupted conversion that differs in {named}\n" in err
        assert f"remove {work_folder(target)}" in err
    stat = (source / "model.safetensors").stat()
    os.utime(source / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    code, _, err = run(VERB, source, target, "--max_shard_size", "1MB")
    assert code == 2 and "differs in source\n" in err
    assert stats(work_folder(target), done) == before and not target.exists()
    os.utime(source / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert result_of(VERB, source, target, "--max_shard_size", "1MB")["resumed_files"] == len(done)
    assert stats(target, done) == before
    equal(target, whole)


def test_work_in_which_no_file_is_whole_hinders_nobody(small: Path, tmp_path: Path) -> None:
    """Nothing of another command's files gets into the target."""
    target = tmp_path / "target"
    killed_after(0, small, target)
    while (log := work_folder(target) / ".written.jsonl").exists():
        log.unlink()
    result = result_of(VERB, small, target, "--dtype", "fp32")
    assert result["resumed_files"] == 0 and sorted(path.name for path in target.glob("*.distcp")) == ["__0_0.distcp"]
    assert sorted(path.name for path in target.iterdir() if path.name.startswith(".")) == [".metadata"]


def test_strict_judges_what_an_interrupted_run_has_seen(small: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(small, source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][0, 0] = float("nan")  # the first to be written
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    killed_after(3, source, target)
    assert "__0_0.distcp" in recorded(target)
    code, _, err = run(VERB, source, target, "--max_shard_size", "1MB", "--strict", "true")
    assert code == 1 and "embedding.word_embeddings.weight: 1 values are NaN or infinite" in err
    assert not target.exists()
    result = result_of(VERB, source, target, "--max_shard_size", "1MB")
    assert result["non_finite"] == report(target)["non_finite"] == {"embedding.word_embeddings.weight": 1}
