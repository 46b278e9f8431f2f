"""What is written is what was there at the call; it reads back at any layout, through megatron-core too."""

from __future__ import annotations

import json

import pytest

from swift_dist.checkpoint import newest_whole


@pytest.mark.parametrize(("writers", "readers"), [(1, 1), (2, 2), (4, 4), (2, 4), (4, 1)])
def test_reads_back_at_any_layout(gang, tmp_path, writers, readers):
    assert gang.run("save", writers, directory=tmp_path, steps=[3, 7]) == [[3, 7]] * writers
    for rank, answer in enumerate(gang.run("read", readers, directory=tmp_path)):
        assert answer["step"] == 7
        assert answer["wrong"] == []
        assert answer["content"] == {"non_homogeneous_layers": True}
        if readers == writers:
            assert answer["object"] == {"rank": rank, "step": 7}


def test_copy_is_private(gang, tmp_path):
    gang.run("save_then_change", 2, directory=tmp_path)
    assert [answer["wrong"] for answer in gang.run("read", 2, directory=tmp_path)] == [[], []]


def test_record_and_latest(gang, tmp_path):
    gang.run("save", 2, directory=tmp_path, steps=[3, 7])
    checkpoint = newest_whole(tmp_path)
    assert checkpoint is not None and checkpoint.step == 7
    assert checkpoint.metadata["consumed_samples"] == 56
    assert (tmp_path / "latest").read_text() == "step_7\n"
    names = {path.name for path in checkpoint.path.iterdir()}
    record = json.loads((checkpoint.path / "swift_dist.json").read_text())
    assert names == {*record["files"], "swift_dist.json"}
    assert names == {".metadata", "common.pt", "metadata.json", "swift_dist.json", "__0_0.distcp", "__1_0.distcp"}


def test_megatron_core_reads_it(gang, tmp_path):
    gang.run("save", 2, directory=tmp_path, steps=[7])
    for answer in gang.run("read_with_megatron", 2, directory=tmp_path / "step_7"):
        assert answer == {"wrong": [], "content": {"non_homogeneous_layers": True}}


def test_second_save_waits_and_says_so(gang, tmp_path):
    for whole, said in gang.run("second_save_waits", 2, directory=tmp_path):
        assert whole == 2
        assert said == ["waiting for the checkpoint of step 1 before that of step 2"]
    assert newest_whole(tmp_path).step == 2


def test_plan_is_not_reused_for_another_structure(gang, tmp_path):
    assert gang.run("structure_changes", 2, directory=tmp_path) == [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]] * 2


def test_mismatches_are_named_on_every_rank(gang, tmp_path):
    gang.run("save", 2, directory=tmp_path, steps=[3, 7])
    for shape, unknown, unasked, different in gang.run("mismatched_load", 2, directory=tmp_path):
        assert shape.startswith("JobError") and "split: shape [24, 5] in the checkpoint, [24, 6] in the job" in shape
        assert unknown.startswith("JobError") and "other: in the job's model, not in the checkpoint" in unknown
        assert unasked.startswith("JobError") and "shared: in the checkpoint, not in the job's model" in unasked
        assert different.startswith("RunError") and "steps [3, 7]" in different


def test_scaling_factors_that_were_never_there_are_left_out(gang, tmp_path):
    """A run goes on in FP8 from a checkpoint that was written without it."""
    gang.run("save", 2, directory=tmp_path, steps=[3])
    assert gang.run("load_with_scales", 2, directory=tmp_path) == [["half", "shared", "split", "wide"]] * 2


def test_poll_says_the_same_on_every_rank(gang, tmp_path):
    first, *others = gang.run("polled", 3, directory=tmp_path)
    assert others == [first, first]
    calls, step, again = first
    assert calls > 1 and step == 4 and again is None


def test_own_gloo_group_beside_another_backend(gang, tmp_path):
    for answer in gang.run("save_and_read_beside_another_backend", 2, directory=tmp_path):
        assert answer["wrong"] == [] and answer["groups left"] == 0
