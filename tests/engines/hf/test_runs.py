"""Whole runs of fine-tuning: on two ranks under every strategy as in one process, resumed, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chat_model
import pytest
from sft_runs import LORA, RANKS, Runs, curve

STRATEGIES = {
    "ddp": {},
    "fsdp2": {"strategy": {"fsdp": "fsdp2"}},
    "zero1": {"strategy": {"deepspeed": "zero1"}},
    "zero2": {"strategy": {"deepspeed": "zero2"}},
    "zero3": {"strategy": {"deepspeed": "zero3"}},
}


@pytest.fixture(scope="module")
def runs(gang: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(gang, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def expected(runs: Runs) -> dict[str, Any]:
    steps = runs.sequences(runs.job())
    common = {"model": runs.model, "batches": steps, "lr": 5e-3, "seed": 3}
    return {
        name: runs.gang.run(RANKS, "reference", 1, adapter=adapter, **common)[0]
        for name, adapter in {"full": None, "lora": LORA}.items()
    }


@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_train_as_one_process(runs: Runs, expected: dict[str, Any], strategy: str, tuner: str) -> None:
    changes = {**STRATEGIES[strategy], **({"tuner": LORA} if tuner == "lora" else {})}
    folder, results = runs.run(runs.job(**changes), 2)
    for got, wanted in zip(curve(folder), expected[tuner], strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
    assert Path(results[0]["export"]).name == ("adapter" if tuner == "lora" else "model")
    held = [result["held"] for result in results]
    if strategy in ("fsdp2", "zero3"):
        one = runs.run(runs.job(**({"tuner": LORA} if tuner == "lora" else {})), 1)[1][0]["held"]
        for rank in held:
            assert rank["parameters"] < 0.6 * one["parameters"]
            # DeepSpeed holds fp32 masters beside fp32 weights: a third number beside the two moments
            assert rank["optimizer"] < 0.6 * one["optimizer"] * (1.5 if strategy == "zero3" else 1)


def test_a_run_goes_on_under_other_ranks_and_another_strategy(runs: Runs, expected: dict[str, Any]) -> None:
    """zero3 on 2 ranks, stopped after 2 steps; fsdp2 on 1 until 3; ddp on 4 to the end."""
    job = runs.job(strategy={"deepspeed": "zero3"})
    folder, results = runs.run(job, 2, stop_after=2)
    assert results[0]["stopped"] and results[0]["step"] == 2 and results[0]["export"] is None
    _, results = runs.run(runs.job(strategy={"fsdp": "fsdp2"}), 1, folder, stop_after=3)
    assert results[0]["step"] == 3
    _, results = runs.run(runs.job(), 4, folder)
    assert results[0]["step"] == 5
    for got, wanted in zip(curve(folder), expected["full"], strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo", "cpo", "simpo", "reward"])
def test_preferences_train_alike_on_one_rank_and_two(runs: Runs, objective: str) -> None:
    if objective == "kto":
        rows = [
            {"messages": row["messages"], "label": index % 2 == 0}
            for index, row in enumerate(chat_model.preferences(24))
        ]
        data = str(chat_model.save_rows(runs.folder / "kto.jsonl", rows))
        changes: dict[str, Any] = {"data": {"train": [data]}}
    else:
        changes = {}
    name = {"name": objective}
    one = runs.run(runs.job("rlhf", objective=name, **changes), 1)[0]
    two = runs.run(runs.job("rlhf", objective=name, strategy={"fsdp": "fsdp2"}, **changes), 2)[0]
    assert len(curve(one)) == 5
    for got, wanted in zip(curve(two), curve(one), strict=True):
        assert got == pytest.approx(wanted, rel=2e-5)
    assert curve(one)[-1] != curve(one)[0]


def test_pretraining_is_that_of_the_megatron_engine(runs: Runs, gang: Any) -> None:
    """The same job on both engines: the same samples, loss and gradient norm of every step."""
    from swift_dist.data.prepare import PrepareOptions, prepare

    text = runs.folder / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": m["messages"][1]["content"]}) + "\n" for m in chat_model.preferences(80))
    )
    prefix = str(runs.folder / "text")
    prepare(PrepareOptions(input=(str(text),), tokenizer=runs.model, output=prefix, append_eod=True, workers=1))
    data = {"train": [prefix], "sequence_length": 32, "workers": None}
    curves = []
    for engine, world, more in (("megatron", 1, {}), ("hf", 2, {"strategy": {"fsdp": "fsdp2"}})):
        folder, _ = runs.run(runs.job("pretrain", engine=engine, data=data, **more), world)
        curves.append(curve(folder))
    for got, wanted in zip(*curves, strict=True):
        assert got == pytest.approx(wanted, rel=2e-5)


@pytest.mark.parametrize("kind", ["classes", "numbers", "several classes"])
def test_labels_train_alike_on_one_rank_and_two(runs: Runs, kind: str) -> None:
    labels = {
        "classes": lambda i: i % 3,
        "numbers": lambda i: i / 7,
        "several classes": lambda i: [i % 3, 2][: 1 + i % 2],
    }
    rows = [
        {"messages": row["messages"][:1], "label": labels[kind](index)}
        for index, row in enumerate(chat_model.preferences(24))
    ]
    data = {"train": [str(chat_model.save_rows(runs.folder / f"{kind}.jsonl", rows))]}
    model = {"num_labels": 1 if kind == "numbers" else 3}
    common = {"objective": {"name": "classification"}, "data": data, "model": model}
    one = runs.run(runs.job(**common), 1)[0]
    two = runs.run(runs.job(strategy={"deepspeed": "zero2"}, **common), 2)[0]
    for got, wanted in zip(curve(two), curve(one), strict=True):
        assert got == pytest.approx(wanted, rel=2e-5)
