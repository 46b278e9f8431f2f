"""Whole runs whose rows several ranks share: loss and gradient norm of every step as on one rank."""

from __future__ import annotations

from typing import Any

import chat_model
import pytest
import sft_ranks
from chat_model import preferences
from sft_runs import LORA, Runs, curve

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
    "output layer saved": (2, {}, {"tuner": {**LORA, "trainable": ["lm_head"]}, **FSDP2}, "sft"),
    "output layer adapted": (2, {}, {"tuner": {**LORA, "lora": {"rank": 4, "target_modules": ["lm_head"]}}}, "sft"),
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
    assert_alike(found, wanted)


def assert_alike(found: list[list[float]], wanted: list[list[float]]) -> None:
    for got, right in zip(found, wanted, strict=True):
        assert got == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize(
    "changes", [{"tuner": LORA}, FSDP2, {"tuner": LORA, **ZERO3}], ids=["lora", "fsdp2", "zero3-lora"]
)
def test_tiled_loss(runs: Runs, alone: Any, changes: dict[str, Any]) -> None:
    folder, _ = runs.run(runs.job(train={"tiled_loss": True}, **changes), 2)
    adapter = {name: value for name, value in changes.items() if name == "tuner"}
    assert_alike(curve(folder), alone("sft", adapter))


@pytest.mark.parametrize("strategy", [FSDP2, ZERO3], ids=["fsdp2", "zero3"])
def test_ranks_without_a_token_that_counts(runs: Runs, alone: Any, strategy: dict[str, Any]) -> None:
    """All that counts of a row are its last tokens, which one rank of two has."""
    rows = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": word}]}
        for prompt in ("red moon " * 20, "the river is bright " * 12, "seven")
        for word in ("blue", "stone", "bird")
    ]
    data = str(chat_model.save_rows(runs.folder / "last.jsonl", rows))
    changes = {"data": {"train": [data]}, "train": {"micro_batch_size": 1, "global_batch_size": 2}}
    parallel = {"context_parallel_size": 2, "ulysses_size": 1}
    folder, _ = runs.run(runs.job(parallel=parallel, **changes, **strategy), 2)
    assert_alike(curve(folder), alone("sft", changes))


def test_evaluation_of_fewer_rows_than_replicas(runs: Runs) -> None:
    """Five rows, four to a batch: of the second batch one of two replicas has nothing."""
    rows = chat_model.save_rows(runs.folder / "validation.jsonl", chat_model.conversations(5, seed=7))
    train = {"steps": 2, "micro_batch_size": 2, "global_batch_size": 4, "eval_interval": 1}
    changes = {"data": {"validation": [str(rows)]}, "train": train, **FSDP2}
    folders = [
        runs.run(runs.job(parallel={"context_parallel_size": size}, **changes), world)[0]
        for world, size in ((4, 2), (1, 1))
    ]
    shared, whole = ([r["eval_loss"] for r in sft_ranks.rows(f) if "eval_loss" in r] for f in folders)
    assert len(whole) == 2 and shared == pytest.approx(whole, rel=1e-5)


def test_kto_and_a_reference_computed_before(runs: Runs, alone: Any) -> None:
    """What ranks count once of a row that all of them see: KTO's statistics, sums of the reference."""
    rows = [{"messages": row["messages"], "label": index % 2 == 0} for index, row in enumerate(preferences(24))]
    kto = {
        "objective": {"name": "kto"},
        "data": {"train": [str(chat_model.save_rows(runs.folder / "kto.jsonl", rows))]},
    }
    before = {"objective": {"name": "dpo", "precompute_reference": True}}
    for changes, strategy in ((kto, {}), (before, FSDP2)):
        folder, _ = runs.run(runs.job("rlhf", parallel={"context_parallel_size": 2}, **changes, **strategy), 2)
        assert_alike(curve(folder), alone("rlhf", changes))


def test_a_run_goes_on_with_other_groups(runs: Runs, alone: Any) -> None:
    """Two ranks that share rows, then one, then four that share them."""
    folder = runs.new_folder()
    for size, stop in ((2, 2), (1, 3), (4, None)):
        _, results = runs.run(
            runs.job(parallel={"context_parallel_size": size}, **FSDP2), size, folder, stop_after=stop
        )
        assert results[0]["step"] == (stop or 5)
    assert_alike(curve(folder), alone("sft", {}))
