"""Joining and leaving the group of all ranks of one attempt. Shared by the engines."""

from __future__ import annotations

import contextlib
import gc
import sys
import types
from datetime import timedelta

import torch
import torch.distributed as dist

from swift_dist.runs.worker import Worker

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits in a collective. Dead peers are noticed at once (gloo) or by the watchdog; this is the net."""

BUILD_TIMEOUT = timedelta(hours=4)
"""The same while one rank reads the weights that the others wait for."""


def join_world(worker: Worker, rendezvous_timeout: float) -> None:
    """Meet the other ranks at the worker's store: NCCL on CUDA, gloo on CPU. `wait_longer` is to follow."""
    on_cuda = worker.device.startswith("cuda")
    if on_cuda:
        torch.cuda.set_device(torch.device(worker.device))
    dist.init_process_group(
        backend="nccl" if on_cuda else "gloo",
        store=worker.store(),
        rank=worker.rank,
        world_size=worker.world_size,
        timeout=timedelta(seconds=rendezvous_timeout),
        device_id=torch.device(worker.device) if on_cuda else None,
    )


def wait_longer(timeout: timedelta = COLLECTIVE_TIMEOUT) -> None:
    """All ranks have met: from here on one may legitimately be late (loading weights, writing a checkpoint)."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def leave_world() -> None:
    """Leave all groups, so that this process can join again. Safe after a peer's death.

    Nothing here talks to a peer. Ranks that wait for this one are released when its sockets close, and gloo closes them
    only with the last reference to a group (its `abort` does nothing), so references are taken away wherever they are.
    """
    if not dist.is_initialized():
        return
    if dist.get_backend() == "nccl":
        with contextlib.suppress(RuntimeError, ValueError):  # a group that a dead peer broke may refuse
            dist.distributed_c10d._abort_process_group()
    _forget_meshes()
    names = dict(dist.distributed_c10d._world.pg_names)
    groups = sorted(names, key=names.__getitem__, reverse=True)
    names.clear()
    dist.destroy_process_group()
    _take_away(groups)
    while groups:
        # A group with an operation in flight waits here until a peer closes its end. All ranks close in the same order,
        # so no two wait for each other.
        groups.pop()


def _forget_meshes() -> None:
    """Take the process groups away from all device meshes, which torch's caches keep alive.

    A mesh holds them in a dict of which Python's garbage collector does not know (its keys and values hold nothing), so
    `_take_away` cannot find it.
    """
    module = sys.modules.get("torch.distributed.device_mesh")
    if module is None:
        return
    for found in gc.get_objects():
        if type(found) is module.DeviceMesh:
            found._pg_registry.clear()


def _take_away(groups: list[dist.ProcessGroup]) -> None:
    """Replace every reference to the groups by None, except `groups` itself. (Megatron's and torch's modules, hooks,
    handles and globals hold hundreds, in cycles.)"""
    wanted = {id(group) for group in groups}
    for holder in gc.get_referrers(*groups):
        if holder is groups or isinstance(holder, types.FrameType):
            continue
        if isinstance(holder, types.CellType):
            holder.cell_contents = None
        elif isinstance(holder, list):
            holder[:] = [None if id(value) in wanted else value for value in holder]
        else:
            table = holder if isinstance(holder, dict) else getattr(holder, "__dict__", {})
            for name in [name for name, value in table.items() if id(value) in wanted]:
                table[name] = None
