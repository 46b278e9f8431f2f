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
