"""What long rows need less memory with: MLPs in tiles, and what recomputed layers keep in the host's memory. Loss and
gradient norm of every step as on one rank without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sft_runs import LORA, Runs, curve

from swift_dist.errors import JobError

FSDP2, ZERO3 = {"strategy": {"fsdp": "fsdp2"}}, {"strategy": {"deepspeed": "zero3"}}
TILED = {"train": {"tiled_mlp": True}}
OFFLOADED = {"train": {"recompute": "full", "offload_activations": True}}
BOTH = {"train": {"recompute": "full", "offload_activations": True, "tiled_mlp": True}}
SHARED = {"parallel": {"context_parallel_size": 2}}


@pytest.fixture(scope="module")
def runs(gang: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(gang, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def alone(runs: Runs) -> Any:
    """The curve of a job on one rank, with nothing of this; each once."""
    known: dict[str, list[list[float]]] = {}

    def of(changes: dict[str, Any]) -> list[list[float]]:
        key = repr(changes)
        if key not in known:
            known[key] = curve(runs.run(runs.job(**changes), 1)[0])
        return known[key]

    return of


CASES = {
    "tiled ddp": ({}, TILED, {}),
    "tiled fsdp2": ({}, TILED, FSDP2),
    "tiled zero3": ({}, TILED, ZERO3),
    "tiled lora ddp": ({"tuner": LORA}, TILED, {}),
    "tiled lora fsdp2": ({"tuner": LORA}, TILED, FSDP2),
    "tiled lora zero3": ({"tuner": LORA}, TILED, ZERO3),
    "offload ddp": ({}, OFFLOADED, {}),
    "offload lora zero3": ({"tuner": LORA}, OFFLOADED, ZERO3),
    "both fsdp2": ({}, BOTH, FSDP2),
    "both zero3": ({}, BOTH, ZERO3),
    "both lora fsdp2": ({"tuner": LORA}, BOTH, FSDP2),
    "shared fsdp2": ({}, BOTH, {**SHARED, **FSDP2}),
    "shared zero3": ({}, BOTH, {**SHARED, **ZERO3}),
    "shared lora": ({"tuner": LORA}, BOTH, SHARED),
}


@pytest.mark.parametrize("case", CASES)
def test_as_on_one_rank(runs: Runs, alone: Any, case: str) -> None:
    tuner, features, spread = CASES[case]
    folder, _ = runs.run(runs.job(**tuner, **features, **spread), 2)
    found, wanted = curve(folder), alone(tuner)
    assert len(found) == 5 and wanted[-1] != wanted[0]
    for got, right in zip(found, wanted, strict=True):
        assert got == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize(
    "changes, key, words",
    [
        ({"train": {"offload_activations": True}}, "train.offload_activations", "train.recompute: full"),
        ({"train": {"tiled_mlp": True, "compile": True}}, "train.tiled_mlp", "leave out"),
    ],
)
def test_refused(runs: Runs, changes: dict[str, Any], key: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        runs.resolved(runs.job(**changes), 2, tmp_path)
    assert caught.value.key == key and words in str(caught.value)
