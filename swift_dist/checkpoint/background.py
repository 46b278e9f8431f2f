"""The thread that writes one rank's part of one checkpoint, and on rank 0 makes the whole of it a checkpoint.

No collectives here: ranks tell each other that their files are done by a small record in the folder that is being
written (every rank sees that folder anyway), so a checkpoint becomes whole even while the main threads are busy.
Failures travel through the main threads (``CheckpointWriter.poll``): a full disk may hold no record.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils.serialization import config as serialization_config

from swift_dist.checkpoint import folder as folders
from swift_dist.checkpoint.planning import WriteItemKey, item_key

logger = logging.getLogger(__name__)

_METADATA_NAME = ".metadata"
_COMMON_NAME = "common.pt"
_FORMAT_NAME = "metadata.json"
_FORMAT_MARKER = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class Stopped(Exception):
    """The writer was closed before this write was done."""


@dataclass(frozen=True)
class Commit:
    """What rank 0 needs to make a folder whole, beside the other ranks' records."""

    index: Metadata
    metadata: dict[str, Any]
    common: bytes
    world_size: int
    keep: int
    keep_every: int


class ShardWrite:
    """One rank's write of one step, in a daemon thread: it dies with its rank.

    Attributes:
        written: set once this rank's files and record are on the disk, or the attempt has ended otherwise.
        finished: set once the thread has nothing left to do; on rank 0 the checkpoint is then whole, or failed.
        error: why it failed, or None.
        committed: True on rank 0 once the folder has its final name.
    """

    def __init__(
        self,
        directory: Path,
        *,
        step: int,
        attempt: int,
        rank: int,
        plan: SavePlan,
        data: Mapping[WriteItemKey, torch.Tensor | io.BytesIO],
        commit: Commit | None,
    ) -> None:
        self.step = step
        self.folder = directory / folders.temporary_name(step, attempt)
        self.final = directory / folders.step_name(step)
        self.written = threading.Event()
        self.finished = threading.Event()
        self.error: BaseException | None = None
        self.committed = False
        self._attempt, self._rank, self._plan, self._data, self._commit = attempt, rank, plan, data, commit
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"checkpoint-{step}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """End the thread at the next shard, or after the commit if that has begun; False if it still runs by then."""
        self._stop.set()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            begun = time.monotonic()
            self._write_shards()
            self.written.set()
            logger.debug("step %d: shards written in %.3f s", self.step, time.monotonic() - begun)
            if self._commit is not None:
                results = self._collect(self._commit.world_size)
                self._make_whole(self._commit, results)
                self.committed = True
                logger.info("checkpoint %s is whole after %.1f s", self.final, time.monotonic() - begun)
                self._prune(self._commit)
        except Stopped:
            pass
        except BaseException as error:  # reported by the main thread; nothing may be lost in a thread
            self.error = error
        finally:
            self._data = {}  # give the copies back
            self.written.set()
            self.finished.set()

    def _write_shards(self) -> None:
        self.folder.mkdir(exist_ok=True)
        results: list[WriteResult] = []
        if self._plan.items:
            writer = _writer(self.folder, self.final)
            source = _StagedData(self._data, self._stop)
            with _without_crc32():
                results = writer.write_data(self._plan, source).wait()  # type: ignore[arg-type]
        items = [_to_row(result) for result in results]
        files = {name: (self.folder / name).stat().st_size for name in {row[3] for row in items}}
        record = self.folder / _record_name(self._rank)
        half = record.with_suffix(".half")
        folders.write_synced(half, json.dumps({"items": items, "files": files}).encode())
        half.rename(record)

    def _collect(self, world_size: int) -> list[list[WriteResult]]:
        """Wait for every rank's record; returns the write results by rank."""
        missing, pause = set(range(world_size)), 0.005
        while True:
            missing = {rank for rank in missing if not (self.folder / _record_name(rank)).exists()}
            if not missing:
                break
            if self._stop.wait(pause):
                raise Stopped
            pause = min(1.0, pause * 1.5)  # many ranks write for minutes: do not hammer a shared file system
        results = []
        for rank in range(world_size):
            path = self.folder / _record_name(rank)
            record = json.loads(path.read_bytes())
            for name, size in record["files"].items():
                found = (self.folder / name).stat().st_size
                if found != size:
                    raise OSError(f"{self.folder / name} has {found} bytes where rank {rank} wrote {size}")
            results.append([_from_row(row) for row in record["items"]])
        return results

    def _make_whole(self, commit: Commit, results: list[list[WriteResult]]) -> None:
        if self._stop.is_set():
            raise Stopped
        _writer(self.folder, self.final).finish(commit.index, results)
        folders.write_synced(self.folder / _COMMON_NAME, commit.common)
        folders.write_synced(self.folder / _FORMAT_NAME, json.dumps(_FORMAT_MARKER).encode())
        for rank in range(commit.world_size):
            (self.folder / _record_name(rank)).unlink()
        folders.write_record(
            self.folder,
            step=self.step,
            metadata=commit.metadata,
            checksummed=(_METADATA_NAME, _COMMON_NAME, _FORMAT_NAME),
        )
        folders.sync_folder(self.folder)
        folders.move_into_place(self.folder, self.final)
        folders.replace_latest(self.final.parent, self.final.name)

    def _prune(self, commit: Commit) -> None:
        try:
            removed = folders.prune(
                self.final.parent,
                keep=commit.keep,
                keep_every=commit.keep_every,
                attempt=self._attempt,
                current=self.step,
            )
        except OSError as error:  # the new checkpoint is whole: old ones that stay only cost space
            logger.warning("old checkpoints in %s could not be removed: %s", self.final.parent, error)
        else:
            if removed:
                logger.info("removed the checkpoints of steps %s", ", ".join(map(str, sorted(removed))))


class _StagedData:
    """Hands torch's writer the private copies, item by item; the place where a write is stopped."""

    def __init__(self, data: Mapping[WriteItemKey, torch.Tensor | io.BytesIO], stop: threading.Event) -> None:
        self._data, self._stop = data, stop

    def resolve_data(self, item: WriteItem) -> Any:
        if self._stop.is_set():
            raise Stopped
        return self._data[item_key(item)]


class _Writer(FileSystemWriter):
    """torch's file writer; its index names the folder as it will be called, not the temporary one."""

    final: Path

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=str(self.final.name), save_id=self.save_id)


def _writer(folder: Path, final: Path) -> _Writer:
    writer = _Writer(folder, sync_files=True, thread_count=1, per_thread_copy_ahead=0)
    writer.final = final
    return writer


def _without_crc32() -> AbstractContextManager[None]:
    """In this thread, torch.save leaves its files' CRC32 out: torch.load never reads it, and writing is 4 x as fast."""
    return serialization_config.patch("save.compute_crc32", False)  # type: ignore[attr-defined]


def _record_name(rank: int) -> str:
    return f"done-{rank}.json"


def _to_row(result: WriteResult) -> list[Any]:
    index, place = result.index, result.storage_data
    offset = None if index.offset is None else list(index.offset)
    return [index.fqn, offset, index.index, place.relative_path, place.offset, place.length]


def _from_row(row: list[Any]) -> WriteResult:
    name, offset, hint, path, start, length = row
    return WriteResult(
        index=MetadataIndex(name, offset, hint),
        size_in_bytes=length,
        storage_data=_StorageInfo(relative_path=path, offset=start, length=length),
    )


def remove_half_written(folder: Path) -> None:
    """Remove the folder of a write that failed (every rank's thread has stopped)."""
    shutil.rmtree(folder, ignore_errors=True)
