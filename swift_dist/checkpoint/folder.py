"""The checkpoint folder on disk: names, the record that says what a whole checkpoint holds, pruning. No torch here.

    checkpoints/
        latest                      the name of the newest committed step, replaced atomically
        step_40/                    whole: the folder got this name only after every file was written and synced
            .metadata               torch.distributed.checkpoint's index (which shard lies where)
            __<rank>_0.distcp       the shards of one rank
            common.pt               what is the same on every rank
            metadata.json           megatron-core's format marker
            swift_dist.json         `Record`: step, metadata, and the size of every other file
        step_60.tmp-1/              being written by attempt 1 (or left behind by it)

A folder counts as a checkpoint when its record is readable and each file has the recorded size: a name alone proves
nothing on a file system that lost writes, and `latest` is a hint for people and scripts, never the truth.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift_dist.errors import JobError

logger = logging.getLogger(__name__)

RECORD_NAME = "swift_dist.json"
LATEST_NAME = "latest"
RECORD_FORMAT = 1
_STEP_PATTERN = re.compile(r"step_(\d+)")
_LEFTOVER_PATTERN = re.compile(r"step_\d+\.(tmp|pruned|replaced)-\d+")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        step: optimizer steps that lie behind it.
        path: its folder.
        metadata: what the caller of ``CheckpointWriter.save`` handed over, plus ``content_metadata`` (megatron-core's
            description of the key style) and ``versions``.
    """

    step: int
    path: Path
    metadata: dict[str, Any]


def step_name(step: int) -> str:
    return f"step_{step}"


def temporary_name(step: int, attempt: int) -> str:
    return f"{step_name(step)}.tmp-{attempt}"


def step_folders(directory: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything in `directory` that is named like a checkpoint, newest first, whole or not."""
    if not directory.is_dir():
        return []
    found = []
    for path in directory.iterdir():
        match = _STEP_PATTERN.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match.group(1)), path))
    return sorted(found, reverse=True)


def write_record(folder: Path, *, step: int, metadata: dict[str, Any], checksummed: Iterable[str]) -> None:
    """Write `folder`'s record: sizes of all files that lie in it now, and checksums of the small `checksummed` ones."""
    files: dict[str, dict[str, int]] = {}
    for path in sorted(folder.iterdir()):
        if path.name != RECORD_NAME:
            files[path.name] = {"bytes": path.stat().st_size}
    for name in checksummed:
        files[name]["crc32"] = zlib.crc32((folder / name).read_bytes())
    record = {"format": RECORD_FORMAT, "step": step, "metadata": metadata, "files": files}
    write_synced(folder / RECORD_NAME, json.dumps(record, indent=1).encode())


def read_record(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, once its files are seen to be whole.

    Raises:
        ValueError: naming the file that is missing, truncated or unreadable.
    """
    record_path = folder / RECORD_NAME
    try:
        record = json.loads(record_path.read_bytes())
        step, metadata, files = int(record["step"]), dict(record["metadata"]), dict(record["files"])
        version = int(record["format"])
    except FileNotFoundError:
        raise ValueError(f"{record_path} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{record_path} is not readable ({error})") from None
    if version != RECORD_FORMAT:
        raise ValueError(f"{record_path} has format {version}; this version reads {RECORD_FORMAT}")
    for name, expected in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
        except OSError:
            raise ValueError(f"{path} is missing") from None
        if size != expected["bytes"]:
            raise ValueError(f"{path} has {size} bytes; {expected['bytes']} were written")
        if "crc32" in expected and zlib.crc32(path.read_bytes()) != expected["crc32"]:
            raise ValueError(f"{path} does not hold what was written (checksum)")
    return Checkpoint(step=step, path=folder, metadata=metadata)


def newest_whole(directory: Path | str) -> Checkpoint | None:
    """The newest whole checkpoint in `directory`; damaged ones are passed over with a warning that names the file."""
    for _, folder in step_folders(Path(directory)):
        try:
            return read_record(folder)
        except ValueError as error:
            logger.warning("checkpoint %s is passed over: %s", folder.name, error)
    return None


def open_checkpoint(path: Path | str, key: str = "checkpoint.load") -> Checkpoint:
    """The checkpoint that a user points at: a step folder, a checkpoints folder, or a run folder.

    Raises:
        JobError: (with `key`) when nothing whole is there.
    """
    path = Path(path)
    if (path / RECORD_NAME).exists() or _STEP_PATTERN.fullmatch(path.name):
        try:
            return read_record(path)
        except ValueError as error:
            raise JobError(key, f"{path} is not a whole checkpoint: {error}", "name another step folder") from None
    for directory in (path / "checkpoints", path):
        checkpoint = newest_whole(directory)
        if checkpoint is not None:
            return checkpoint
    raise JobError(key, f"no whole checkpoint in {path}", "name a step folder, or a run folder that has one")


def replace_latest(directory: Path, name: str) -> None:
    """Point `latest` at `name`: readers see the old name or the new one, never half of it."""
    temporary = directory / f".{LATEST_NAME}.tmp"
    write_synced(temporary, f"{name}\n".encode())
    temporary.replace(directory / LATEST_NAME)
    sync_folder(directory)


def move_into_place(temporary: Path, final: Path) -> None:
    """Give the finished folder `temporary` its `final` name; a folder that holds that name already is replaced."""
    if final.exists():
        replaced = final.with_name(temporary.name.replace(".tmp-", ".replaced-"))
        final.rename(replaced)
        temporary.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        temporary.rename(final)
    sync_folder(final.parent)


def prune(directory: Path, *, keep: int, keep_every: int, attempt: int, current: int) -> list[int]:
    """Remove whole checkpoints except the `keep` newest, every multiple of `keep_every` (0: none), `current`, and the
    one that the newest's metadata names as ``keep_step`` (the best by evaluation).

    Damaged folders neither count as kept nor are removed. A folder loses its name first, so that a reader never
    takes a half-removed one for a checkpoint.

    Returns:
        the removed steps.
    """
    whole, best = [], None
    for step, folder in step_folders(directory):
        try:
            checkpoint = read_record(folder)
        except ValueError as error:
            logger.warning("checkpoint %s is damaged and left alone: %s", folder.name, error)
        else:
            whole.append((step, folder))
            best = checkpoint.metadata.get("keep_step") if len(whole) == 1 else best
    removed = []
    for step, folder in whole[keep:]:
        if step in (current, best) or (keep_every and step % keep_every == 0):
            continue
        doomed = folder.with_name(f"{folder.name}.pruned-{attempt}")
        try:
            folder.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:  # an old checkpoint that stays costs space, not the run
            logger.warning("old checkpoint %s could not be removed: %s", folder, error)
        else:
            removed.append(step)
    return removed


def remove_leftovers(directory: Path) -> list[str]:
    """Remove what earlier attempts left half-written, half-pruned or half-replaced; returns the names.

    Call it only where no writer of an earlier attempt runs any more: the gang has ended or taken over each of them
    before a new attempt starts, and one run folder belongs to one command.
    """
    if not directory.is_dir():
        return []
    removed = []
    for path in sorted(directory.iterdir()):
        if _LEFTOVER_PATTERN.fullmatch(path.name) and path.is_dir():
            logger.info("removing %s, left by an earlier attempt", path)
            shutil.rmtree(path)
            removed.append(path.name)
    return removed


def write_synced(path: Path, content: bytes) -> None:
    """Write `content` and force it to the disk."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Force the names in `folder` to the disk: a rename is lasting only then."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
