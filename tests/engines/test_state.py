"""Saving and resuming: exact on the same layout, the same numbers on any other, always over several resumed steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_engine import MOE, TINY, job

RANKS = Path(__file__).with_name("engine_ranks.py")
SAVED_AT, STEPS = 2, 5


def save(gang: Any, folder: Path, world: int, made: dict[str, Any]) -> list[tuple[float, float]]:
    folder.mkdir()
    found = gang.run(RANKS, "train_and_save", world, job=made, folder=str(folder), saved_at=SAVED_AT, steps=STEPS)
    return found[0]


def resume(gang: Any, folder: Path, world: int, made: dict[str, Any]) -> list[tuple[float, float]]:
    found = gang.run(RANKS, "load_and_train", world, job=made, folder=str(folder), saved_at=SAVED_AT, steps=STEPS)
    assert all(rank == found[0] for rank in found)
    return found[0]


ALSO_IN_CHECKPOINT = [
    (1, {}, {}),
    (2, {}, {}),
    (2, {"use_distributed_optimizer": False}, {}),
    (2, {}, {"precision": "bf16"}),
    (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, {}),
    (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, {}),
]
"""tests/checkpoint/test_resume.py has these with our own writer and the page of a rank around the engine."""
SAME = [
    (2, {"use_distributed_optimizer": False}, {"precision": "bf16"}),
    (2, {}, {"precision": "fp16", "initial_loss_scale": 2.0**18}),
    (2, {"use_distributed_optimizer": False}, {"optimizer": "sgd"}),
    *(pytest.param(*case, marks=pytest.mark.table) for case in ALSO_IN_CHECKPOINT),
]


@pytest.mark.parametrize(("world", "parallel", "train"), SAME)
def test_resume_on_the_same_layout_is_exact(
    gang: Any, tmp_path: Path, world: int, parallel: dict[str, Any], train: dict[str, Any]
) -> None:
    """With dropout, so that a generator that is not restored shows."""
    update_rule = train.get("optimizer", "adamw")
    train = {key: value for key, value in train.items() if key != "optimizer"}
    made = job({**TINY, "num_hidden_layers": 4, "attention_dropout": 0.1}, train, **parallel)
    made["optimizer"]["name"] = update_rule
    straight = save(gang, tmp_path / "saved", world, made)
    assert resume(gang, tmp_path / "saved", world, made) == straight


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_exact_where_adam_counts_in_its_groups(
    gang: Any, tmp_path: Path, precision: str, sharded: bool
) -> None:
    """As transformer-engine's and apex's do, which is what runs on a GPU."""
    made = job(TINY, {"precision": precision}, use_distributed_optimizer=sharded)
    arguments = {"job": made, "folder": str(tmp_path), "saved_at": SAVED_AT, "steps": STEPS}
    straight = gang.run(RANKS, "with_group_adam", 2, what="train_and_save", **arguments)
    assert gang.run(RANKS, "with_group_adam", 2, what="load_and_train", **arguments) == straight


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_the_loss_scale_survives_another_layout(
    gang: Any, tmp_path: Path, before: int, after: int, sharded: bool
) -> None:
    """Both steps before the save overflow, so there was no update yet, and the second one halves the scale."""

    def made(experts: int) -> dict[str, Any]:
        train = {"precision": "fp16", "initial_loss_scale": 2.0**26}
        return job(MOE, train, use_distributed_optimizer=sharded, expert_model_parallel_size=experts)

    save(gang, tmp_path / "saved", 2, made(before))
    scales = gang.run(RANKS, "loss_scale_after_load", 2, job=made(after), folder=str(tmp_path / "saved"))
    assert scales == [2.0**25, 2.0**25]


def test_dropout_streams_differ_between_steps_and_ranks(gang: Any) -> None:
    made = job({**TINY, "attention_dropout": 0.5}, tensor_model_parallel_size=2)
    plain = gang.run(RANKS, "losses", 2, job=job(TINY, tensor_model_parallel_size=2), steps=1)
    dropped = gang.run(RANKS, "losses", 2, job=made, steps=1)
    assert plain[0] != dropped[0]


def test_experts_split_another_way_resume(gang: Any, tmp_path: Path) -> None:
    """Other changes of the layout: tests/checkpoint/test_resume.py."""
    straight = save(gang, tmp_path / "saved", 2, job(MOE, expert_model_parallel_size=2))
    for world, parallel in (
        (2, {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1, "expert_model_parallel_size": 2}),
        (2, {"expert_tensor_parallel_size": 2}),
    ):
        resumed = resume(gang, tmp_path / "saved", world, job(MOE, **parallel))
        for (loss, _), (expected, _) in zip(resumed, straight, strict=True):
            assert abs(loss - expected) <= 1e-6, parallel
