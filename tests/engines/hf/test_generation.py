"""Answers during evaluation: those of transformers' own greedy `generate`, whichever way the model is shared out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sft_runs import LORA, Runs

from swift_dist.errors import JobError

COUNT, TOKENS = 3, 12
EVAL = {"steps": 2, "eval_interval": 1, "eval_steps": 2, "eval_answers": COUNT, "eval_answer_tokens": TOKENS}


@pytest.fixture(scope="module")
def runs(gang: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(gang, tmp_path_factory.mktemp("runs"))


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def job(runs: Runs, task: str = "sft", **changes: Any) -> Any:
    data = {"split_ratio": 0.3, **changes.pop("data", {})}
    return runs.job(task, train=EVAL, data=data, **changes)


@pytest.fixture(scope="module")
def alone(runs: Runs) -> tuple[Path, list[dict[str, Any]]]:
    folder, _ = runs.run(job(runs), 1)
    return folder, answers(folder)


def test_as_generate_of_transformers(alone: tuple[Path, list[dict[str, Any]]]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, rows = alone
    assert [row["step"] for row in rows] == [1] * COUNT + [2] * COUNT
    numbers = [row["number"] for row in rows]
    assert numbers[:COUNT] == numbers[COUNT:] == sorted(set(numbers))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for row in rows[COUNT:]:
        prompt = tokenizer(row["prompt"], return_tensors="pt", add_special_tokens=False)
        wanted = model.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert row["answer"] == tokenizer.decode(wanted)
        assert row["prompt"].endswith("assistant\n") and row["expected"].strip().endswith("<|im_end|>")


CASES = {
    "ulysses, fsdp2": (2, {"parallel": {"context_parallel_size": 2}, "strategy": {"fsdp": "fsdp2"}}),
    "ring, zero3, packing": (
        2,
        {
            "parallel": {"context_parallel_size": 2, "ulysses_size": 1},
            "strategy": {"deepspeed": "zero3"},
            "data": {"packing": True},
        },
    ),
    "two groups": (4, {"parallel": {"context_parallel_size": 2}}),
    "padded": (2, {"data": {"padding_free": False}}),
}


@pytest.mark.parametrize("case", CASES)
def test_shared_out(runs: Runs, alone: tuple[Path, list[dict[str, Any]]], case: str) -> None:
    """The first evaluation sees weights after one step, which are the same to rounding; packing makes other steps."""
    world, changes = CASES[case]
    folder, _ = runs.run(job(runs, **changes), world)
    rows = answers(folder)
    keys = ("number", "prompt", "expected") if "packing" in case else ("number", "prompt", "expected", "answer")
    assert [[row[key] for key in keys] for row in rows] == [[row[key] for key in keys] for row in alone[1]]
    assert all(row["answer"] for row in rows)


def test_chosen_answers_of_pairs(runs: Runs) -> None:
    folder, _ = runs.run(job(runs, "rlhf", tuner=LORA), 1)
    rows = answers(folder)
    chosen = [json.loads(line) for line in Path(runs.pairs).read_text().splitlines()]
    replies = {row["messages"][-1]["content"] for row in chosen}
    assert len(rows) == 2 * COUNT
    assert all(row["expected"].split("<|im_end|>")[0].strip() in {reply.strip() for reply in replies} for row in rows)


def test_a_model_of_scores_answers_nothing(runs: Runs, tmp_path: Path) -> None:
    changed = job(runs, "rlhf", objective={"name": "reward"})
    with pytest.raises(JobError, match="eval_answers"):
        runs.resolved(changed, 1, tmp_path)
