"""``CheckpointWriter``: asynchronous, whole-or-nothing checkpoints of a gang."""

from __future__ import annotations

import copy
import errno
import logging
import socket
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from swift_dist.checkpoint import folder as folders
from swift_dist.checkpoint import planning
from swift_dist.checkpoint.background import Commit, ShardWrite, remove_half_written
from swift_dist.checkpoint.groups import gloo_group
from swift_dist.checkpoint.staging import StagingArena
from swift_dist.errors import RunError

logger = logging.getLogger(__name__)

_STOP_SECONDS = 3.0  # how long close() waits for a thread that is inside one file operation


class CheckpointWriter:
    """Writes checkpoints of all ranks into ``directory/step_<n>``, by default while training goes on.

    Every method except ``close`` is collective: all ranks call it at the same step boundary, from the main thread.
    ``save`` returns when each rank holds a private copy of its shards; a thread of each rank then writes them, and
    rank 0's gives the folder its name once all have. Nothing is ever visible under ``step_<n>`` that is not whole.

    Args:
        directory: the run's ``checkpoints`` folder, seen by all ranks.
        keep: newest checkpoints that stay.
        keep_every: checkpoints whose step is a multiple of this stay for ever (0: none).
        attempt: which start of the gang this is (``Worker.attempt``); leftovers of the others are removed.
        async_save: False makes ``save`` return only when the checkpoint is whole.

    Raises:
        RunError: the folder cannot be made.
    """

    def __init__(self, directory: Path, *, keep: int, keep_every: int, attempt: int, async_save: bool) -> None:
        self.directory = Path(directory)
        self._keep, self._keep_every, self._attempt, self._async = keep, keep_every, attempt, async_save
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._group, self._owns_group = gloo_group()
        self._arena = StagingArena()
        self._plan: planning.Plan | None = None
        self._write: ShardWrite | None = None
        self._newest: int | None = None
        error = None
        if self._rank == 0:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                folders.remove_leftovers(self.directory)
            except OSError as failure:
                error = failure
        self._raise_if_any(error, self.directory)

    def save(self, step: int, sharded_state_dict: dict[str, Any], metadata: dict[str, Any]) -> None:
        """Checkpoint the state after optimizer step `step`.

        Args:
            step: optimizer steps done. A step that this writer has saved already is not saved twice.
            sharded_state_dict: megatron-core's, of this rank; consumed.
            metadata: plain JSON values that travel with the checkpoint. ``content_metadata`` in it (the key style) is
                also stored where megatron-core looks for it.

        Raises:
            RunError: on every rank, where any rank cannot plan, copy or (of an earlier save) write.
        """
        if step == self._newest:
            return
        if self._write is not None:
            logger.info("waiting for the checkpoint of step %d before that of step %d", self._write.step, step)
            self.wait()
        begun = time.monotonic()
        temporary = self.directory / folders.temporary_name(step, self._attempt)
        local = self._collect(sharded_state_dict, metadata, temporary)
        plan = self._planned(local, temporary)
        staged = self._stage(local, plan, temporary)
        self._write = ShardWrite(
            self.directory,
            step=step,
            attempt=self._attempt,
            rank=self._rank,
            plan=plan.for_torch(self._rank),
            data={**staged, **local.objects},
            commit=self._commit(local, plan, metadata) if self._rank == 0 else None,
        )
        self._newest = step
        self._write.start()
        logger.debug("step %d: save() took %.3f s", step, time.monotonic() - begun)
        if not self._async:
            self.wait()

    def poll(self) -> int | None:
        """Ask, without waiting, how the save in flight is doing: one tiny all-reduce while there is one, else nothing.

        Returns:
            the step whose checkpoint has become whole since the last call (the same on every rank), or None.

        Raises:
            RunError: on every rank, where any rank's write failed. The half-written folder is gone by then.
        """
        if self._write is None:
            return None
        write = self._write
        whole = write.committed and write.finished.is_set()  # true on rank 0 alone
        return self._done(write) if self._raise_if_any(write.error, write.folder, whole) else None

    def wait(self) -> int | None:
        """Wait until the save in flight is whole; returns its step (None: there was none). Raises as ``poll`` does."""
        if self._write is None:
            return None
        write = self._write
        write.written.wait()
        self._raise_if_any(write.error, write.folder)  # from here on every rank's record is there
        if self._rank == 0:
            write.finished.wait()
        self._raise_if_any(write.error, write.folder)
        return self._done(write)

    def close(self) -> None:
        """Stop. A write that is not whole yet is abandoned, unless only its last touches are missing (call ``wait``
        first to keep it). Not collective: peers may be dead."""
        write, self._write = self._write, None
        if write is not None and not write.stop(_STOP_SECONDS):
            logger.warning(
                "the write of %s does not end; it is left behind and cannot become a checkpoint", write.folder
            )
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._owns_group = False

    def _collect(self, state: dict[str, Any], metadata: dict[str, Any], temporary: Path) -> planning.LocalShards:
        local, error = None, None
        try:
            local = planning.collect_shards(state, metadata.get(planning.CONTENT_METADATA_KEY))
            if self._rank == 0:
                remove_half_written(temporary)
                temporary.mkdir()
        except Exception as failure:
            error = failure
        stale = local is not None and (self._plan is None or not self._plan.fits(local))
        if self._raise_if_any(error, temporary, stale):
            self._plan = None  # on every rank, if it is on one
        assert local is not None
        return local

    def _planned(self, local: planning.LocalShards, temporary: Path) -> planning.Plan:
        """The plan for this structure: the last save's if it fits, else a new one."""
        if self._plan is None:
            error = None
            try:
                self._plan = planning.make_plan(local, self._group)
            except ValueError as failure:  # the same on every rank
                error = failure
            self._raise_if_any(error, temporary)
        assert self._plan is not None
        return self._plan

    def _stage(
        self, local: planning.LocalShards, plan: planning.Plan, temporary: Path
    ) -> dict[planning.WriteItemKey, torch.Tensor]:
        """Private copies of what this rank writes."""
        staged, error, keys = [], None, plan.tensor_keys()
        try:
            staged = self._arena.stage([local.tensors[key] for key in keys])
        except (RuntimeError, MemoryError) as failure:  # no memory
            error = failure
        self._raise_if_any(error, temporary)
        return dict(zip(keys, staged, strict=True))

    def _commit(self, local: planning.LocalShards, plan: planning.Plan, metadata: dict[str, Any]) -> Commit:
        assert plan.index is not None
        versions = {name: version(name) for name in ("torch", "megatron-core")}
        return Commit(
            index=copy.copy(plan.index),
            metadata={**metadata, "versions": versions, "attempt": self._attempt, "world_size": self._world_size},
            common=local.common,
            world_size=self._world_size,
            keep=self._keep,
            keep_every=self._keep_every,
        )

    def _done(self, write: ShardWrite) -> int:
        self._write = None
        return write.step

    def _reduce(self, flags: list[bool]) -> list[int]:
        """The maximum of each flag over the ranks."""
        values = torch.tensor([int(flag) for flag in flags], dtype=torch.int64)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group)
        return values.tolist()

    def _raise_if_any(self, error: BaseException | None, folder: Path, flag: bool = False) -> int:
        """Exchange failures, and one flag with them (returned: its maximum). Raises the same RunError on every rank."""
        failed, flagged = self._reduce([error is not None, flag])
        if not failed:
            return flagged
        if self._write is not None:
            self._write.stop(_STOP_SECONDS)
            self._write = None
        self._newest = None
        reasons: list[Any] = [None] * self._world_size
        own = None if error is None else (socket.gethostname(), *_explain(error, folder))
        dist.all_gather_object(reasons, own, group=self._group)  # after this no rank writes into the folder any more
        if self._rank == 0 and folder != self.directory:
            remove_half_written(folder)
        dist.barrier(group=self._group)
        rank, (host, reason, remedy) = next((r, reason) for r, reason in enumerate(reasons) if reason is not None)
        raise RunError(f"the checkpoint {folder} could not be written: rank {rank} on {host}: {reason}", remedy)


def _explain(error: BaseException, folder: Path) -> tuple[str, str]:
    """(reason, remedy) of a failed write. torch's file writer may hide the system's error behind its own."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__cause__ or seen.__context__
    again = "then run the same command again: it goes on from the newest whole checkpoint"
    if seen is None or seen.errno is None:
        return f"{type(error).__name__}: {error}", ""
    reason = f"{seen.strerror}" + (f" ({seen.filename})" if seen.filename else "")
    if seen.errno in (errno.ENOSPC, errno.EDQUOT):
        return reason, f"free space on the disk of {folder.parent}, or lower checkpoint.keep; {again}"
    if seen.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return reason, f"make {folder.parent} writable for this user; {again}"
    if seen.errno == errno.EFBIG:
        return reason, f"raise the file size limit (ulimit -f); {again}"
    return reason, f"see to {folder.parent}; {again}"
