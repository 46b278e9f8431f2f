"""What the ranks of a test gang do. Run by gang_server.py, never imported by the tests."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject

from swift_dist.checkpoint import CheckpointWriter, load, newest_whole

CONTENT = {"non_homogeneous_layers": True}


def full(name: str, rows: int, columns: int, step: int) -> torch.Tensor:
    """The global tensor `name` at `step`: a value per element that no other name, place or step has."""
    base = sum(map(ord, name)) * 1000 + step * 17
    return base + torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns) / 7


def build(
    rank: int, world: int, step: int, rows: int = 24, columns: int = 5
) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """A rank's sharded state: split by rows, by columns as a strided view, replicated, bf16, an object per rank."""
    rows_each = rows // world
    split = full("split", rows, columns, step)[rank * rows_each : (rank + 1) * rows_each].clone()
    wide = full("wide", columns, rows, step)[:, rank * rows_each : (rank + 1) * rows_each]  # not contiguous
    shared = full("shared", 3, 3, step)
    half = full("half", rows, 2, step)[rank * rows_each : (rank + 1) * rows_each].to(torch.bfloat16)
    state = {
        "model": {
            "split": ShardedTensor.from_rank_offsets("split", split, (0, rank, world)),
            "wide": ShardedTensor.from_rank_offsets("wide", wide, (1, rank, world)),
            "shared": ShardedTensor.from_rank_offsets("shared", shared, replica_id=rank),
            "half": ShardedTensor.from_rank_offsets("half", half, (0, rank, world)),
        },
        "object": ShardedObject("object", {"rank": rank, "step": step}, (world,), (rank,)),
        "schedule": {"steps": step, "lr": 0.5 / (step + 1)},
    }
    return state, [split, wide, shared, half]


def writer_for(directory: str, **options: Any) -> CheckpointWriter:
    return CheckpointWriter(
        Path(directory), **{"keep": 2, "keep_every": 0, "attempt": 0, "async_save": True, **options}
    )


def wrong_tensors(rank: int, world: int, loaded: dict[str, Any], step: int) -> list[str]:
    """Names of loaded values that differ from what step `step` was."""
    expected, _ = build(rank, world, step)
    wrong = [
        name
        for name, value in expected["model"].items()
        if not torch.equal(loaded["model"][name], value.data.contiguous())
    ]
    return wrong + [name for name in ("schedule",) if loaded[name] != expected[name]]


def save(rank: int, world: int, directory: str, steps: list[int], **options: Any) -> list[int | None]:
    writer = writer_for(directory, **options)
    whole = []
    for step in steps:
        writer.save(step, build(rank, world, step)[0], {"consumed_samples": step * 8, "content_metadata": CONTENT})
        whole.append(writer.wait())
    writer.close()
    return whole


def save_then_change(rank: int, world: int, directory: str) -> int | None:
    writer = writer_for(directory)
    for step in (1, 2):  # the second reuses plan and buffers
        state, tensors = build(rank, world, step)
        writer.save(step, state, {})
        for tensor in tensors:
            tensor.fill_(-1.0)
    whole = writer.wait()
    writer.close()
    return whole


def read(rank: int, world: int, directory: str) -> dict[str, Any]:
    checkpoint = newest_whole(directory)
    assert checkpoint is not None
    state, _ = build(rank, world, 0)
    if world != checkpoint.metadata["world_size"]:
        state.pop("object")
    loaded = load(checkpoint, state)
    return {
        "step": checkpoint.step,
        "wrong": wrong_tensors(rank, world, loaded, checkpoint.step),
        "object": loaded.get("object"),
        "content": loaded.get("content_metadata"),
    }


def timing(rank: int, world: int, directory: str, mebibytes: int, saves: int) -> dict[str, Any]:
    writer = writer_for(directory)
    rows = mebibytes * 1024 // 8 // world * world
    tensors = {f"t{n}": torch.ones(rows // world, 128 * 8) for n in range(2)}
    calls, whole = [], []
    for step in range(saves):
        state = {k: ShardedTensor.from_rank_offsets(k, t, (0, rank, world)) for k, t in tensors.items()}
        begun = time.monotonic()
        writer.save(step, state, {})
        calls.append(time.monotonic() - begun)
        writer.wait()
        whole.append(time.monotonic() - begun)
    writer.close()
    return {"calls": calls, "whole": whole, "bytes": sum(t.nbytes for t in tensors.values())}
