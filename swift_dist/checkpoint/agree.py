"""All ranks begin at the same place."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from swift_dist.checkpoint.folder import Checkpoint, newest_whole, open_checkpoint, read_record, step_name

if TYPE_CHECKING:
    import torch.distributed

log = logging.getLogger(__name__)


def agree_on_checkpoint(
    directory: Path, load: str | None, *, rank: int, store: torch.distributed.Store
) -> Checkpoint | None:
    """The newest whole checkpoint in `directory`, else the one at `load` (`checkpoint.load`), else none.

    Rank 0 looks and the others follow: on a shared file system two ranks may see different folders at one moment.
    """
    if rank == 0:
        found = newest_whole(directory)
        if found is None and load:
            found = open_checkpoint(load)
        store.set("resume_from", str(found.path) if found else "")
    return _told(store, "resume_from")


def agree_on_step(directory: Path, step: int, *, rank: int, store: torch.distributed.Store) -> Checkpoint | None:
    """The checkpoint of `step` in `directory`, if it is there and whole; rank 0 looks. Ask once in an attempt."""
    if rank == 0:
        folder = directory / step_name(step)
        try:
            read_record(folder)
        except ValueError as error:
            log.warning("checkpoint %s cannot be read: %s", folder.name, error)
            store.set("weights_from", "")
        else:
            store.set("weights_from", str(folder))
    return _told(store, "weights_from")


def _told(store: torch.distributed.Store, name: str) -> Checkpoint | None:
    path = store.get(name).decode()
    return open_checkpoint(path) if path else None
