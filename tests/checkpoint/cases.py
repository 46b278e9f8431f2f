"""What the ranks of a test gang do. Run by gang_server.py, never imported by the tests."""

from __future__ import annotations

import logging
import os
import resource
import signal
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject

from swift_dist.checkpoint import CheckpointWriter, background, load, newest_whole, open_checkpoint
from swift_dist.errors import JobError, RunError

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


def save_until_killed(rank: int, world: int, directory: str) -> None:
    """Step 1 whole; then a write of step 2 that has begun and does not end."""
    writer = writer_for(directory)
    writer.save(1, build(rank, world, 1)[0], {})
    writer.wait()
    _stick_at_second_item()
    writer.save(2, build(rank, world, 2)[0], {})
    writer.wait()


def _stick_at_second_item() -> None:
    resolve, seen = background._StagedData.resolve_data, []

    def slow(self, item):
        seen.append(item)
        while len(seen) > 1 and not self._stop.is_set():
            time.sleep(0.01)
        return resolve(self, item)

    background._StagedData.resolve_data = slow  # type: ignore[method-assign]


def peer_dies(rank: int, world: int, directory: str) -> dict[str, Any] | None:
    """The last rank dies in the middle of its write; how long do the others take to notice, and to close?"""
    writer = writer_for(directory)
    _stick_at_second_item()
    writer.save(1, build(rank, world, 1)[0], {})
    dist.barrier()
    if rank == world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begun, error = time.monotonic(), None
    while error is None:
        try:
            writer.poll()
        except RuntimeError as failure:
            error = failure
    noticed = time.monotonic()
    writer.close()
    return {"noticed": noticed - begun, "closed": time.monotonic() - noticed, "error": type(error).__name__}


def failing_write(rank: int, world: int, directory: str, rows: int, limit: int | None = None) -> dict[str, Any]:
    """Steps with a save that fails (on the last rank if there is a file size `limit`): what each rank gets to know."""
    writer = writer_for(directory)
    writer.save(1, build(rank, world, 1)[0], {})
    writer.wait()
    if limit is not None and rank == world - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    answer: dict[str, Any] = {"steps": 0}
    try:
        writer.save(2, build(rank, world, 2, rows=rows)[0], {})
        for _ in range(2000):
            answer["steps"] += 1
            if writer.poll():
                break
            time.sleep(0.005)
    except RunError as error:
        answer |= {"message": error.message, "remedy": error.remedy}
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    answer["left"] = sorted(path.name for path in Path(directory).iterdir())
    dist.barrier()
    if limit is not None:  # the cause is gone: the same writer goes on
        writer.save(3, build(rank, world, 3)[0], {})
        answer["then"] = writer.wait()
    writer.close()
    return answer


def bad_states(rank: int, world: int, directory: str) -> list[str]:
    """Messages of saves that must be refused on every rank although one rank is at fault."""
    writer = writer_for(directory)
    messages = []

    def attempt(state: dict[str, Any]) -> None:
        try:
            writer.save(len(messages) + 1, state, {})
        except RunError as error:
            messages.append(error.message)

    hole = {"w": ShardedTensor.from_rank_offsets("w", torch.ones(2), (0, rank, world + 1))}
    attempt(hole)
    overlap = {"w": ShardedTensor.from_rank_offsets("w", torch.ones(2), (0, 0, world))}
    attempt(overlap)
    attempt({"o": ShardedObject("o", Fraction(1, 2) if rank == world - 1 else 1, (world,), (rank,))})
    attempt({"w": None if rank else ShardedTensor.from_rank_offsets("w", torch.ones(2)).without_data()})
    messages.append(",".join(sorted(path.name for path in Path(directory).iterdir())))
    writer.close()
    return messages


def second_save_waits(rank: int, world: int, directory: str) -> list[Any]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("swift_dist.checkpoint").addHandler(handler)
    logging.getLogger("swift_dist.checkpoint").setLevel(logging.INFO)
    writer = writer_for(directory)
    for step in (1, 2, 2):  # the repeated one is not written twice
        writer.save(step, build(rank, world, step)[0], {})
    whole = writer.wait()
    writer.close()
    return [whole, [text for text in said if "waiting" in text]]


def structure_changes(rank: int, world: int, directory: str) -> list[Any]:
    """The plan of one save must not be used for a state with other tensors, even where only one rank's differ."""
    writer = writer_for(directory)
    writer.save(1, build(rank, world, 1)[0], {})
    state, _ = build(rank, world, 2)
    if rank == world - 1:
        state["extra"] = ShardedTensor.from_rank_offsets("extra", torch.arange(7.0))
    writer.save(2, state, {})
    writer.wait()
    writer.close()
    asked = {"extra": ShardedTensor.from_rank_offsets("extra", torch.zeros(7), replica_id=rank)}
    checkpoint = newest_whole(directory)
    assert checkpoint is not None
    return load(checkpoint, asked, strict=False)["extra"].tolist()


def mismatched_load(rank: int, world: int, directory: str) -> list[str]:
    checkpoint = newest_whole(directory)
    assert checkpoint is not None
    messages = []
    for change in ("shape", "unknown", "unasked", "different checkpoints"):
        state, _ = build(rank, world, 0, columns=6 if change == "shape" else 5)
        if change == "unknown" and rank == world - 1:
            state["other"] = ShardedTensor.from_rank_offsets("other", torch.zeros(2))
        if change == "unasked":
            del state["model"]["shared"]
        if change == "different checkpoints" and rank == 0:
            checkpoint = open_checkpoint(Path(directory) / "step_3")
        try:
            load(checkpoint, state)
        except (JobError, RunError) as error:
            messages.append(f"{type(error).__name__}: {error.message}")
    return messages


def load_with_scales(rank: int, world: int, directory: str) -> list[str]:
    """Ask for FP8 scaling factors that the newest checkpoint does not have; the names that came back."""
    state, _ = build(rank, world, 0)
    state["model"]["linear._extra_state"] = ShardedObject("linear._extra_state", None, (world,), (rank,))
    return sorted(load(newest_whole(directory), state)["model"])


def load_error(rank: int, world: int, path: str) -> str:
    state, _ = build(rank, world, 0)
    try:
        load(open_checkpoint(path), state)
    except (JobError, RunError) as error:
        return f"{type(error).__name__}: {error.message}"
    return "loaded"


def read_with_megatron(rank: int, world: int, directory: str) -> dict[str, Any]:
    """megatron-core's own load, nothing of ours."""
    state, _ = build(rank, world, 0)
    loaded = dist_checkpointing.load(state, directory, validate_access_integrity=True, strict="raise_all")
    return {"wrong": wrong_tensors(rank, world, loaded, 7), "content": loaded["content_metadata"]}


def polled(rank: int, world: int, directory: str) -> list[Any]:
    """(call at which poll said that the step is whole, what it said); rank 1 is slow to write."""
    writer = writer_for(directory)
    if rank == 1:
        resolve = background._StagedData.resolve_data
        background._StagedData.resolve_data = lambda *a: (time.sleep(0.05), resolve(*a))[1]  # type: ignore[method-assign]
    assert writer.poll() is None
    writer.save(4, build(rank, world, 4)[0], {})
    calls = 1
    while (step := writer.poll()) is None:
        calls += 1
        time.sleep(0.001)
    again = writer.poll()
    writer.close()
    return [calls, step, again]


def save_and_read_beside_another_backend(rank: int, world: int, directory: str) -> dict[str, Any]:
    """As where NCCL trains: the default group is not for CPU tensors, so a gloo group is made, used and left."""
    dist.get_backend_config = lambda group=None: "cuda:nccl"
    groups = len(dist.distributed_c10d._world.pg_map)
    save(rank, world, directory, [3])
    return {**read(rank, world, directory), "groups left": len(dist.distributed_c10d._world.pg_map) - groups}
