"""Whether two runs ended alike, in every bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from dist_tensors import dist_tensors
from toy_job import INTERVAL, STEPS, Run

from swift_dist.checkpoint import open_checkpoint


def assert_same_end(output: Path, quiet: Run) -> None:
    """Checkpoints and metrics of both runs are the same, and the folder holds nothing else."""
    assert_same_checkpoint(output, quiet)
    rows, expected = metrics(output), metrics(quiet.output)
    assert rows == expected and [row[0] for row in rows] == list(range(1, STEPS + 1))  # each step exactly once
    folder = sorted(p.name for p in (output / "checkpoints").iterdir())
    assert folder == sorted(["latest", f"step_{STEPS}", f"step_{STEPS - INTERVAL}"])


def assert_same_checkpoint(output: Path, quiet: Run) -> None:
    """Weights, optimizer, generators and the engine's numbers after the last step."""
    mine, theirs = open_checkpoint(output), open_checkpoint(quiet.output)
    assert mine.step == theirs.step == STEPS
    left, right = dist_tensors(mine.path), dist_tensors(theirs.path)
    assert left.keys() == right.keys()
    assert any("exp_avg" in key for key in left) and any("embedding" in key for key in left)
    different = [key for key, tensor in left.items() if not same(tensor, right[key])]
    assert different == []
    assert same(*(torch.load(c.path / "common.pt", weights_only=False) for c in (mine, theirs)))


def same(one: Any, other: Any) -> bool:
    """Equal in every bit and type, through dicts and lists."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return (
            one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def metrics(output: Path) -> list[tuple[int, float, float, float]]:
    """(step, loss, gradient norm, rate) of every row."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in rows]
