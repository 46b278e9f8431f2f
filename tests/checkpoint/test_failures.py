"""Killed writers, full disks, damaged and malicious checkpoints."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import time

import pytest

from swift_dist.checkpoint import newest_whole


def test_killed_while_writing(gang, tmp_path):
    started = gang.start("save_until_killed", 2, directory=tmp_path)
    half = tmp_path / "step_2.tmp-0"
    end = time.monotonic() + 60
    while len(list(half.glob("*.distcp"))) < 2:
        assert time.monotonic() < end, started.output()
        time.sleep(0.01)
    for pid in started.pids:
        os.kill(pid, signal.SIGKILL)
    assert started.join() == [None, None]
    assert half.is_dir()
    assert newest_whole(tmp_path).step == 1
    assert (tmp_path / "latest").read_text() == "step_1\n"
    gang.run("save", 2, directory=tmp_path, steps=[5], attempt=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_1", "step_5"]


def test_dead_peer_is_noticed_and_close_does_not_hang(gang, tmp_path):
    *alive, dead = gang.start("peer_dies", 3, directory=tmp_path).join()
    assert dead is None
    for answer in alive:
        assert answer["noticed"] < 40 and answer["closed"] < 30
    assert newest_whole(tmp_path) is None


def test_file_size_limit_on_one_rank_fails_all(gang, tmp_path):
    answers = gang.run("failing_write", 2, directory=tmp_path, rows=200_000, limit=1 << 20)
    for answer in answers:
        assert "step_2.tmp-0" in answer["message"] and "rank 1 on" in answer["message"]
        assert "File too large" in answer["message"]
        assert "ulimit -f" in answer["remedy"]
        assert answer["left"] == ["latest", "step_1"]
        assert answer["then"] == 3
    assert newest_whole(tmp_path).step == 3


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk(gang, small_disk):
    for answer in gang.run("failing_write", 2, directory=small_disk, rows=200_000):
        assert "No space left on device" in answer["message"] and "step_2.tmp-0" in answer["message"]
        assert "free space on the disk of" in answer["remedy"]
        assert answer["left"] == ["latest", "step_1"]
    assert newest_whole(small_disk).step == 1


def test_states_that_cannot_be_read_back_are_refused(gang, tmp_path):
    for answer in gang.run("bad_states", 2, directory=tmp_path):
        assert len(answer) == 5, answer
        hole, overlap, code, empty, left = answer
        assert "do not make up the tensors" in hole and "Invalid access pattern" in hole
        assert "do not make up the tensors" in overlap
        assert "rank 1" in code and "more than tensors and plain values" in code
        assert "rank 0" in empty
        assert left == ""


@pytest.fixture
def three(gang, tmp_path):
    gang.run("save", 2, directory=tmp_path, steps=[1, 2, 3], keep=3)
    return tmp_path


@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "common.pt", "metadata.json", "swift_dist.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_checkpoints_are_passed_over(three, caplog, name, damage):
    path = three / "step_3" / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    assert newest_whole(three).step == 2
    assert name in caplog.text and "step_3" in caplog.text


def test_flipped_index_is_noticed(three):
    path = three / "step_3" / ".metadata"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert newest_whole(three).step == 2


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_malicious_pickle_is_not_run(gang, three, tmp_path, name):
    import json
    import zlib

    import torch

    target, path = tmp_path / "owned", three / "step_3" / name
    if name == ".metadata":
        path.write_bytes(pickle.dumps(_Touch(target)))
    else:
        torch.save({"schedule": _Touch(target)}, path)
    record = json.loads((three / "step_3/swift_dist.json").read_text())  # whoever can write the one can write the other
    record["files"][name] = {"bytes": path.stat().st_size, "crc32": zlib.crc32(path.read_bytes())}
    (three / "step_3/swift_dist.json").write_text(json.dumps(record))
    for message in gang.run("load_error", 2, path=three / "step_3"):
        assert message.startswith("RunError") and "step_3" in message and "mkdir" in message
    assert not target.exists()
