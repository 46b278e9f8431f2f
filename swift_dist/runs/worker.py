"""What a rank knows about itself and how it talks to whoever started it. Implemented by the gang and by torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch.distributed


class Worker(Protocol):
    """One rank of one attempt. Nothing here blocks: a step boundary costs microseconds."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    attempt: int
    """0 for the first start of this command, one more after each restart of the gang."""
    device: str
    """``cpu`` or ``cuda:<n>``."""
    run_dir: Path

    def store(self) -> torch.distributed.Store:
        """The attempt's rendezvous store, open and fresh (hand it to ``init_process_group(store=...)``)."""
        ...

    def beat(self, phase: str, step: int) -> None:
        """Say where this rank is: ``phase`` in {"import", "build", "load", "step", "eval", "save", "final"}."""
        ...

    def stop_requested(self) -> bool:
        """True once the run was asked to checkpoint and end (Ctrl-C, SIGTERM, ``runs stop``)."""
        ...
