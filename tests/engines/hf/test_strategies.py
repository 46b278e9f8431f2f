"""Strategies ddp and fsdp2 on gloo ranks give what plain torch gives in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import strategy_ranks as by_rank
import torch

RANKS = Path(by_rank.__file__)
STEPS = 5
DDP: dict[str, Any] = {"strategy": {}}
FSDP: dict[str, Any] = {"strategy": {"fsdp": "fsdp2"}}


def compare(found: list[Any], case: dict[str, Any], tolerance: float = 1e-5) -> None:
    numbers, weights = by_rank.alone(case, len(found[0][0]))
    for got, _, _ in found:
        assert torch.allclose(torch.tensor(got), torch.tensor(numbers), rtol=0, atol=tolerance), (got, numbers)
    got = found[0][1]
    assert got.keys() == weights.keys()
    for name, weight in weights.items():
        assert (got[name] - weight).abs().max() <= tolerance, name


CASES = {
    "full": {},
    "tied": {"family": "qwen2", "config": {"tie_word_embeddings": True}},
    "some": {"family": "qwen2", "learns": "some"},
    "lora": {"learns": "lora"},
    "recompute": {"recompute": True},
}


@pytest.mark.parametrize("strategy", [DDP, FSDP], ids=["ddp", "fsdp2"])
def test_two_ranks_train_as_one_process_does(gang: Any, strategy: dict[str, Any]) -> None:
    cases = [{**case, "job": strategy} for case in CASES.values()]
    found = gang.run(RANKS, "train", 2, cases=cases, steps=STEPS)
    for case, *by_case in zip(cases, *found, strict=True):
        compare(by_case, case)
