"""Whole runs of the training page in a test gang. Run by gang_server.py, never imported by the tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from swift_dist import train as training


@dataclass
class FileWorker:
    """A rank that meets the others in a file."""

    rank: int
    world_size: int
    run_dir: Path
    meeting: str
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    attempt: int = 0
    device: str = "cpu"
    opened: dist.Store | None = None

    def store(self) -> dist.Store:
        self.opened = self.opened or dist.FileStore(self.meeting, self.world_size)
        return self.opened

    def beat(self, phase: str, step: int) -> None: ...

    def stop_requested(self) -> bool:
        return False


def make_data(rank: int, world: int, prefix: str, vocab_size: int) -> str:
    """A small dataset of random documents."""
    generator = torch.Generator().manual_seed(5)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in torch.randint(5, 60, (400,), generator=generator).tolist():
        builder.add_document(torch.randint(0, vocab_size, (length,), generator=generator), [length])
    builder.finalize(f"{prefix}.idx")
    return prefix


def train(rank: int, world: int, payload: dict[str, Any], run_dir: str) -> dict[str, Any]:
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    worker = FileWorker(rank, world, Path(run_dir), meeting=f"{run_dir}.meeting")
    return training.main(payload, worker)
