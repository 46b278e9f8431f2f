"""All ranks begin at the same place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from swift_dist.checkpoint.folder import Checkpoint, newest_whole, open_checkpoint

if TYPE_CHECKING:
    import torch.distributed


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
    path = store.get("resume_from").decode()
    return open_checkpoint(path) if path else None
