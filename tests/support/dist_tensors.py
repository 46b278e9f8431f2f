"""The tensors of a torch_dist checkpoint, as torch tensors."""

from __future__ import annotations

from pathlib import Path

import torch

from swift_dist.converters.dist_index import dist_index
from swift_dist.converters.reading import Reader, as_torch


def dist_tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = Reader()
    return {key: as_torch(reader.read(stored)) for key, stored in dist_index(folder).items()}
