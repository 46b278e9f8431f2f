"""Whole runs whose rows several ranks share: loss and gradient norm of every step as on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sft_runs import LORA, Runs, curve

from swift_dist.errors import JobError

FSDP2, ZERO3 = {"strategy": {"fsdp": "fsdp2"}}, {"strategy": {"deepspeed": "zero3"}}


@pytest.fixture(scope="module")
def runs(gang: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(gang, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def alone(runs: Runs) -> Any:
    """The curve of a job on one rank; each once."""
    known: dict[str, list[list[float]]] = {}

    def of(task: str, changes: dict[str, Any]) -> list[list[float]]:
        key = repr((task, changes))
        if key not in known:
            known[key] = curve(runs.run(runs.job(task, **changes), 1)[0])
        return known[key]

    return of


CASES = {
    "ulysses": (2, {}, {}, "sft"),
    "ring": (2, {"ulysses_size": 1}, FSDP2, "sft"),
    "two groups": (4, {}, ZERO3, "sft"),
    "both": (4, {"context_parallel_size": 4, "ulysses_size": 2}, FSDP2, "sft"),
    "three": (3, {"context_parallel_size": 3}, {"train": {"recompute": "full"}}, "sft"),
    "packing": (2, {}, {"data": {"packing": True}, **FSDP2}, "sft"),
    "lora": (2, {"ulysses_size": 1}, {"tuner": LORA, **ZERO3}, "sft"),
    "dpo": (2, {"ulysses_size": 1}, {**FSDP2}, "rlhf"),
    "dpo lora": (4, {}, {"tuner": LORA}, "rlhf"),
    "whole logits": (2, {}, {"train": {"tiled_loss": False}}, "sft"),
    "orpo": (2, {}, {"objective": {"name": "orpo"}}, "rlhf"),
}


@pytest.mark.parametrize("case", CASES)
def test_as_on_one_rank(runs: Runs, alone: Any, case: str) -> None:
    world, parallel, changes, task = CASES[case]
    without = {name: value for name, value in changes.items() if name != "strategy"}
    parallel = {"context_parallel_size": 2, **parallel}
    folder, _ = runs.run(runs.job(task, parallel=parallel, **changes), world)
    found, wanted = curve(folder), alone(task, without)
    assert len(found) == 5 and wanted[-1] != wanted[0]
    for got, right in zip(found, wanted, strict=True):
        assert got == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize("strategy", [{}, FSDP2, ZERO3])
@pytest.mark.parametrize("adapter", [{}, {"tuner": LORA}])
def test_tiled_loss(runs: Runs, alone: Any, strategy: dict[str, Any], adapter: dict[str, Any]) -> None:
    folder, _ = runs.run(runs.job(train={"tiled_loss": True}, **strategy, **adapter), 2)
    for got, right in zip(curve(folder), alone("sft", adapter), strict=True):
        assert got == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize(
    "changes, key, words",
    [
        ({"parallel": {"context_parallel_size": 3}}, "parallel.context_parallel_size", "one of 1, 2, 4"),
        ({"parallel": {"context_parallel_size": 4, "ulysses_size": 3}}, "parallel.ulysses_size", "one of 1, 2, 4"),
        ({"parallel": {"ulysses_size": 2}}, "parallel.ulysses_size", "has no effect"),
        (
            {"parallel": {"context_parallel_size": 2}, "tuner": {"name": ["full", "neftune"]}},
            "tuner.name",
            "leave one of them out",
        ),
        ({"parallel": {"context_parallel_size": 2}, "data": {"padding_free": False}}, "data.padding_free", "leave one"),
    ],
)
def test_refused(runs: Runs, changes: dict[str, Any], key: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        runs.resolved(runs.job(**changes), 4, tmp_path)
    assert caught.value.key == key and words in str(caught.value)
