"""The distributed optimizer's state in a checkpoint: the right numbers of the right tensors, and each of them once."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import MOE, TINY, job

RANKS = Path(__file__).with_name("engine_ranks.py")


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (5, 1), (1, 6), (2, 3, 4)])
def test_boxes_are_the_flat_range(shape: tuple[int, ...]) -> None:
    from swift_dist.checkpoint.boxes import boxes

    flat = torch.arange(math.prod(shape))
    array = flat.view(shape)
    for start, stop in itertools.combinations_with_replacement(range(len(flat) + 1), 2):
        found = list(boxes(shape, start, stop))
        parts = [array[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))].flatten() for box in found]
        assert torch.equal(torch.cat(parts) if parts else flat[:0], flat[start:stop])
        assert len(found) <= max(2 * len(shape) - 1, 1)


@pytest.mark.parametrize(
    ("model", "world", "precision", "parallel"),
    [
        (TINY, 2, "fp32", {}),
        (TINY, 4, "bf16", {"tensor_model_parallel_size": 2}),
        ({**TINY, "tie_word_embeddings": True}, 4, "bf16", {"pipeline_model_parallel_size": 2}),
        (MOE, 4, "bf16", {"expert_model_parallel_size": 2}),
    ],
)
def test_no_rank_holds_more_than_its_share(
    gang: Any, model: dict[str, Any], world: int, precision: str, parallel: dict[str, Any]
) -> None:
    """For each state: the main copies' boxes fill every tensor exactly; a rank's numbers are what it updates."""
    ranks = gang.run(RANKS, "optimizer_boxes", world, job=job(model, {"precision": precision}, **parallel))
    filled: dict[str, torch.Tensor] = {}
    for rank in ranks:
        assert rank["held"] == rank["owned"]
        for key, shape, corner, size, main in rank["boxes"]:
            place = tuple(slice(o, o + s) for o, s in zip(corner, size, strict=True))
            filled.setdefault(key, torch.zeros(shape, dtype=torch.int))[place] += int(main)
    assert all(bool((count == 1).all()) for count in filled.values())
    states = {key.split(".")[2] for key in filled}
    assert states == {"exp_avg", "exp_avg_sq", "param"}


@pytest.mark.parametrize(("before", "after"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_another_precision_goes_on_from_the_exact_masters(gang: Any, tmp_path: Path, before: str, after: str) -> None:
    """In fp32 the master is the weight: the rounded bf16 weight must not win."""
    jobs = [job(TINY, {"precision": precision}, tensor_model_parallel_size=2) for precision in (before, after)]
    assert gang.run(RANKS, "masters_before_and_after", 4, jobs=jobs, folder=str(tmp_path)) == [True] * 4
