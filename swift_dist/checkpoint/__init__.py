"""Checkpoints: what is saved, which is the newest whole one, what a resume may change.

``from swift_dist.checkpoint import newest_whole`` costs nothing; the names that need torch and megatron-core
(``CheckpointWriter``, ``load``) are imported when first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from swift_dist.checkpoint.agree import agree_on_checkpoint, agree_on_step
from swift_dist.checkpoint.folder import Checkpoint, newest_whole, open_checkpoint
from swift_dist.checkpoint.resume import Difference, require_same_training, resume_difference

if TYPE_CHECKING:
    from swift_dist.checkpoint.loading import load
    from swift_dist.checkpoint.writer import CheckpointWriter

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "Difference",
    "agree_on_checkpoint",
    "agree_on_step",
    "load",
    "newest_whole",
    "open_checkpoint",
    "require_same_training",
    "resume_difference",
]


def __getattr__(name: str) -> Any:
    if name == "CheckpointWriter":
        from swift_dist.checkpoint.writer import CheckpointWriter

        return CheckpointWriter
    if name == "load":
        from swift_dist.checkpoint.loading import load

        return load
    raise AttributeError(name)
