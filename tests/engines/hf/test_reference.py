"""Preferences beside a reference: the model itself before it learnt, or another; in memory, or computed before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chat_model
import numpy as np
import pytest
import reference_ranks
import sft_ranks
from sft_runs import LORA, Runs, curve

from swift_dist.config import JobConfig
from swift_dist.errors import JobError, RunError

RANKS = Path(reference_ranks.__file__)
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {"fsdp": "fsdp2"},
    "zero2": {"deepspeed": "zero2"},
    "zero3": {"deepspeed": "zero3"},
}
PRECOMPUTE = {"precompute_reference": True}


@pytest.fixture(scope="module")
def runs(gang: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(gang, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def other(runs: Runs) -> str:
    """Another reference model than the one that learns."""
    return str(chat_model.save_chat_model(runs.folder / "other", seed=5))


def job(runs: Runs, strategy: str = "ddp", tuner: dict[str, Any] | None = None, **changes: Any) -> JobConfig:
    given = {"strategy": STRATEGIES[strategy], **({"tuner": tuner} if tuner else {}), **changes}
    return runs.job("rlhf", **{key: value for key, value in given.items() if value})


def watched(runs: Runs, of: JobConfig, world: int, folder: Path | None = None, **more: Any) -> tuple[Path, list[Any]]:
    if folder is None:
        folder = runs.new_folder()
    payload = runs.resolved(of, world, folder)
    return folder, runs.gang.run(RANKS, "watched", world, payload=payload, run_dir=str(folder), **more)


@pytest.fixture(scope="module")
def expected(runs: Runs, other: str) -> dict[str, Any]:
    common = {"model": runs.model, "steps": runs.sequences(runs.job("rlhf")), "lr": 5e-3, "seed": 3, "beta": 0.1}
    return {
        "adapter": runs.gang.run(RANKS, "dpo", 1, reference=runs.model, adapter=LORA, **common)[0],
        "full": runs.gang.run(RANKS, "dpo", 1, reference=other, adapter=None, **common)[0],
    }


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        ("fsdp2", "full"),
        ("zero3", "adapter"),
        pytest.param("fsdp2", "adapter", marks=pytest.mark.table),
        pytest.param("zero3", "full", marks=pytest.mark.table),
    ],
)
def test_two_ranks_learn_preferences_as_one_process(
    runs: Runs, other: str, expected: dict[str, Any], strategy: str, kind: str
) -> None:
    """The adapter switched off as the reference, with activations computed again in the backward pass; and all weights
    beside another model. A rank has four micro-batches a step."""
    if kind == "adapter":
        changes: dict[str, Any] = {"tuner": LORA, "train": {"micro_batch_size": 1, "recompute": "full"}}
    else:
        changes = {"objective": {"reference": other}, "train": {"micro_batch_size": 1}}
    folder, _ = runs.run(job(runs, strategy, **changes), 2)
    assert len(curve(folder)) == 5
    for got, wanted in zip(curve(folder), expected[kind], strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("zero3", marks=pytest.mark.table)])
def test_a_reference_has_no_dropout_and_no_adapter(runs: Runs, strategy: str) -> None:
    """Within a step of a model that has learnt, whose activations are computed again in the backward pass."""
    model = str(chat_model.save_chat_model(runs.folder / f"dropout-{strategy}", attention_dropout=0.4))
    tuner = {"name": ["lora"], "lora": {"rank": 4, "dropout": 0.3}}
    changes = {"data": {"padding_free": False}, "train": {"recompute": "full"}, "model": {"path": model}}
    payload = runs.resolved(job(runs, strategy, tuner, **changes), 2, runs.new_folder())
    for rank in runs.gang.run(RANKS, "beside_a_learner", 2, payload=payload, run_dir="", reference=model):
        assert rank["off"] <= 1e-5
        assert rank["learnt"] > 1e-2 and rank["dropout"] > 1e-2


@pytest.mark.parametrize(
    ("strategy", "world", "kind", "changes"),
    [
        ("zero3", 2, "full", {}),
        pytest.param("ddp", 2, "adapter", {"data": {"padding_free": False}}, marks=pytest.mark.table),
        pytest.param("ddp", 1, "full", {}, marks=pytest.mark.table),
        pytest.param("fsdp2", 2, "full", {"train": {"micro_batch_size": 1}}, marks=pytest.mark.table),
        pytest.param("fsdp2", 2, "adapter", {}, marks=pytest.mark.table),
        pytest.param("zero2", 2, "full", {}, marks=pytest.mark.table),
        pytest.param("zero2", 2, "adapter", {"train": {"micro_batch_size": 1}}, marks=pytest.mark.table),
        pytest.param("zero3", 2, "adapter", {"data": {"padding_free": False}}, marks=pytest.mark.table),
        pytest.param("fsdp2", 4, "full", {}, marks=pytest.mark.table),
    ],
)
def test_log_probabilities_computed_before_train_alike(
    runs: Runs, other: str, expected: dict[str, Any], strategy: str, world: int, kind: str, changes: dict[str, Any]
) -> None:
    """Five steps are almost two epochs: most samples are met twice, and computed once."""
    objective = {**PRECOMPUTE, **({"reference": other} if kind == "full" else {})}
    made = job(runs, strategy, LORA if kind == "adapter" else None, objective=objective, **changes)
    folder, ranks = watched(runs, made, world)
    for got, wanted in zip(curve(folder), expected[kind], strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
    assert sum(rank["passes"] for rank in ranks) == 24 / made.train.micro_batch_size
    (numbers,) = reference_ranks.numbers(folder).values()
    assert len(numbers) == 2 * 24 * 8 and np.isfinite(np.frombuffer(numbers)).all()


@pytest.mark.parametrize("objective", ["kto", pytest.param("dpo", marks=pytest.mark.table)])
def test_with_an_evaluation_too(runs: Runs, objective: str) -> None:
    changes: dict[str, Any] = {"train": {"steps": 3, "eval_interval": 2}, "data": {"split_ratio": 0.25}}
    if objective == "kto":
        changes["tuner"] = LORA
        changes["data"]["padding_free"] = False
        rows = [
            {"messages": row["messages"], "label": index % 2 == 0}
            for index, row in enumerate(chat_model.preferences(30))
        ]
        changes["data"]["train"] = [str(chat_model.save_rows(runs.folder / "kto.jsonl", rows))]
    live, before = (
        runs.run(job(runs, objective={"name": objective, **more}, **changes), world)[0]
        for world, more in ((1, {}), (2, PRECOMPUTE))
    )
    rows_live, rows_before = (sft_ranks.rows(folder) for folder in (live, before))
    assert len(rows_before) == len(rows_live) == 5 and "eval_loss" in rows_live[2]
    for got, wanted in zip(rows_before, rows_live, strict=True):
        names = [name for name in wanted if "/" in name or name in ("loss", "grad_norm", "eval_loss", "kl", "eval_kl")]
        assert names
        for name in names:
            assert got[name] == pytest.approx(wanted[name], rel=2e-5, abs=2e-6), name


@pytest.mark.parametrize(("strategy", "world"), [("ddp", 1), pytest.param("fsdp2", 2, marks=pytest.mark.table)])
def test_no_second_model_is_held(runs: Runs, strategy: str, world: int) -> None:
    train = {"steps": 2}
    held = {}
    for name, objective in {"live": {}, "before": PRECOMPUTE, "none": {"name": "cpo"}}.items():
        made = job(runs, strategy, objective=objective, train=train)
        held[name] = [rank["bytes"] for rank in watched(runs, made, world)[1]]
    for live, before, none in zip(held["live"], held["before"], held["none"], strict=True):
        size = sum(file.stat().st_size for file in Path(runs.model).glob("*.safetensors"))
        assert live - before == pytest.approx(size / world, rel=0.1)
        assert before == pytest.approx(none, rel=0.02)


def test_a_killed_pass_goes_on_and_more_steps_compute_only_what_they_need(
    runs: Runs, other: str, expected: dict[str, Any]
) -> None:
    """Killed before its 4th micro-batch; asked to stop; trained for two steps; then for five, under two ranks."""
    objective = {**PRECOMPUTE, "reference": other}
    made = job(runs, objective=objective, train={"steps": 2})
    folder, ranks = watched(runs, made, 1, kill_at=3)
    assert ranks == [None]
    begun = reference_ranks.numbers(folder)
    (numbers,) = begun.values()
    assert np.isfinite(np.frombuffer(numbers)).sum() == 3 * 2 * 2  # micro-batches of two pairs
    _, (rank,) = watched(runs, made, 1, folder, stop_at=1)
    assert (rank["stopped"], rank["step"], rank["checkpoint"], rank["passes"]) == (True, 0, None, 1)
    assert curve(folder) == []
    _, (rank,) = watched(runs, made, 1, folder)
    assert rank["step"] == 2 and rank["passes"] == 16 / 2 - 3 - 1
    shown = [row["prepared"] for row in sft_ranks.rows(folder) if "prepared" in row]
    assert shown == pytest.approx([1 / 8, 2 / 8, 3 / 8, 1 / 5, 1 / 4, 2 / 4, 3 / 4, 1], abs=1e-4)
    more = job(runs, "fsdp2", objective=objective)
    _, ranks = watched(runs, more, 2, folder)
    assert sum(rank["passes"] for rank in ranks) == (24 - 16) / 2
    assert all(rank["step"] == 5 for rank in ranks)
    assert reference_ranks.numbers(folder).keys() == begun.keys()
    for got, wanted in zip(curve(folder), expected["full"], strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)


def test_numbers_of_another_model_or_other_rows_are_not_taken(runs: Runs, other: str) -> None:
    import shutil

    model = runs.folder / "changing"
    shutil.copytree(other, model)
    objective = {**PRECOMPUTE, "reference": str(model)}
    train = {"steps": 1}
    folder, (rank,) = watched(runs, job(runs, objective=objective, train=train), 1)
    first = reference_ranks.numbers(folder)
    assert rank["passes"] == 8 / 2
    shutil.rmtree(folder / "checkpoints")
    chat_model.save_chat_model(model, seed=6)  # other weights at the same place
    _, (rank,) = watched(runs, job(runs, objective=objective, train=train), 1, folder)
    second = reference_ranks.numbers(folder)
    assert rank["passes"] == 8 / 2 and len(second) == 1 and second.keys() != first.keys()
    shutil.rmtree(folder / "checkpoints")
    rows = str(chat_model.save_rows(runs.folder / "others.jsonl", chat_model.preferences(24, seed=1)))
    both = {"train": [rows], "validation": [rows]}  # the same rows to train and to evaluate on
    last = job(runs, objective=objective, train={**train, "eval_interval": 1}, data=both)
    _, (rank,) = watched(runs, last, 1, folder)
    assert rank["passes"] == (8 + 24) / 2
    training, evaluated = (np.frombuffer(found) for found in reference_ranks.numbers(folder).values())
    assert np.isfinite(training).sum() == 2 * 8 and np.isfinite(evaluated).all()
    assert np.allclose(training[np.isfinite(training)], evaluated[np.isfinite(training)], rtol=1e-6)
    assert not second.keys() & reference_ranks.numbers(folder).keys()
    path = sorted((folder / "reference").iterdir())[0]
    path.write_bytes(path.read_bytes()[:-8])  # torn
    shutil.rmtree(folder / "checkpoints")
    _, (rank,) = watched(runs, last, 1, folder)
    assert rank["passes"] == 8 / 2 and [len(found) for found in reference_ranks.numbers(folder).values()] == [384, 384]


def test_a_reference_that_gives_no_numbers_is_told(runs: Runs) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    broken = runs.folder / "broken"
    chat_model.save_chat_model(broken)
    model = AutoModelForCausalLM.from_pretrained(broken, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    model.save_pretrained(broken)
    with pytest.raises(RunError, match="not finite"):
        watched(runs, job(runs, objective={**PRECOMPUTE, "reference": str(broken)}), 1)


@pytest.mark.parametrize("task", ["sft", "rlhf"])
def test_an_objective_without_a_reference_refuses_the_pass(runs: Runs, task: str) -> None:
    objective = {**PRECOMPUTE, **({"name": "orpo"} if task == "rlhf" else {})}
    with pytest.raises(JobError, match="needs no reference model") as raised:
        runs.resolved(runs.job(task, objective=objective), 1, runs.folder / "none")
    assert raised.value.key == "objective.precompute_reference"


def test_streaming_refuses_the_pass(runs: Runs) -> None:
    with pytest.raises(JobError, match="begins with the first of them") as raised:
        runs.resolved(job(runs, objective=PRECOMPUTE, data={"streaming": True}), 1, runs.folder / "none")
    assert raised.value.key == "objective.precompute_reference"
