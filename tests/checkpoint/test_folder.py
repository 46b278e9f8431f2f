"""Names, pruning, `latest`, leftovers: no processes needed."""

from __future__ import annotations

import logging

import pytest

from swift_dist.checkpoint import folder as folders
from swift_dist.checkpoint import newest_whole, open_checkpoint
from swift_dist.errors import JobError


def make(directory, step):
    path = directory / f"step_{step}"
    path.mkdir(parents=True)
    (path / "data").write_bytes(b"x" * 10)
    folders.write_record(path, step=step, metadata={"n": step}, checksummed=())
    return path


def steps(directory):
    return [step for step, _ in folders.step_folders(directory)]


@pytest.mark.parametrize(
    ("keep", "keep_every", "kept"),
    [(1, 0, [60]), (2, 0, [60, 50]), (2, 20, [60, 50, 40, 20]), (9, 0, [60, 50, 40, 30, 20, 10])],
)
def test_prune(tmp_path, keep, keep_every, kept):
    for step in (10, 20, 30, 40, 50, 60):
        make(tmp_path, step)
    folders.prune(tmp_path, keep=keep, keep_every=keep_every, attempt=0, current=60)
    assert steps(tmp_path) == kept
    assert not folders.remove_leftovers(tmp_path)


def test_prune_never_counts_damaged_ones_nor_removes_the_current(tmp_path):
    for step in (10, 20, 30, 40):
        make(tmp_path, step)
    (tmp_path / "step_40" / "data").unlink()  # a resume went back behind it
    folders.prune(tmp_path, keep=1, keep_every=0, attempt=0, current=20)
    assert steps(tmp_path) == [40, 30, 20]
    assert newest_whole(tmp_path).step == 30


def test_leftovers(tmp_path):
    make(tmp_path, 10)
    for name in ("step_20.tmp-0", "step_30.tmp-12", "step_5.pruned-0", "step_10.replaced-1", "notes", "step_x.tmp-0"):
        (tmp_path / name).mkdir()
    assert folders.remove_leftovers(tmp_path) == [
        "step_10.replaced-1",
        "step_20.tmp-0",
        "step_30.tmp-12",
        "step_5.pruned-0",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step_10", "step_x.tmp-0"]


def test_an_existing_step_is_replaced(tmp_path):
    make(tmp_path, 10)
    fresh = make(tmp_path / "other", 10)
    (fresh / "data").write_bytes(b"y" * 10)
    fresh.rename(tmp_path / "step_10.tmp-3")
    folders.move_into_place(tmp_path / "step_10.tmp-3", tmp_path / "step_10")
    assert (tmp_path / "step_10/data").read_bytes() == b"y" * 10
    assert steps(tmp_path) == [10] and not folders.remove_leftovers(tmp_path)


def test_latest_is_replaced_by_a_rename(tmp_path, monkeypatch):
    folders.replace_latest(tmp_path, "step_1")

    def fail(self, target):
        raise OSError("power cut")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="power cut"):
        folders.replace_latest(tmp_path, "step_2")
    assert (tmp_path / "latest").read_text() == "step_1\n"


def test_latest_is_a_hint(tmp_path):
    make(tmp_path, 10), make(tmp_path, 20)
    folders.replace_latest(tmp_path, "step_10")
    assert newest_whole(tmp_path).step == 20


def test_nothing_there(tmp_path):
    assert newest_whole(tmp_path / "none") is None
    assert newest_whole(tmp_path) is None


def test_open_what_a_user_points_at(tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    make(tmp_path / "run/checkpoints", 10), make(tmp_path / "run/checkpoints", 20)
    for path in ("run", "run/checkpoints", "run/checkpoints/step_20"):
        assert open_checkpoint(tmp_path / path).step == 20
    (tmp_path / "run/checkpoints/step_20/data").unlink()
    assert open_checkpoint(tmp_path / "run").step == 10
    with pytest.raises(JobError, match=r"checkpoint\.load.*step_20 is not a whole checkpoint.*data is missing"):
        open_checkpoint(tmp_path / "run/checkpoints/step_20")
    with pytest.raises(JobError, match="no whole checkpoint"):
        open_checkpoint(tmp_path / "nowhere")
