"""The layout of a file that torch.save would write, without its values: what is where, for values that come later.

torch writes everything but the tensors' values (``torch.serialization.skip_data``) and seeks over those; what it writes
is kept, what it seeks over are the places of the values. Nothing of a tensor's size is ever in memory: the tensors
handed in are empty, and never touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from swift_dist.converters.stored import TO_TORCH


@dataclass(frozen=True)
class ArchiveLayout:
    """An archive of torch.save.

    Args:
        size: of the whole archive, in bytes.
        literals: (offset, bytes) of all but the values.
        places: (offset, bytes) of each storage's values, in the order in which torch met them. Storages without
            elements have none.
    """

    size: int
    literals: tuple[tuple[int, bytes], ...]
    places: tuple[tuple[int, int], ...]


def archive_layout(content: Any) -> ArchiveLayout:
    """Lay out what ``torch.save(content, ...)`` would write; its tensors may be `torch.empty`."""
    sink = _Sink()
    with torch.serialization.skip_data():
        torch.save(content, sink)  # type: ignore[arg-type]
    return ArchiveLayout(sink.at, tuple(sink.literals()), tuple(sink.skipped))


@lru_cache(maxsize=4096)
def tensor_layout(shape: tuple[int, ...], dtype: str) -> ArchiveLayout:
    """The archive of one tensor. All of a shape and dtype look alike."""
    return archive_layout(empty(shape, dtype))


def empty(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    return torch.empty(shape, dtype=getattr(torch, TO_TORCH[dtype]))


class _Sink:
    """A file that keeps what is written and remembers what is skipped."""

    def __init__(self) -> None:
        self.at = 0
        self.skipped: list[tuple[int, int]] = []
        self._runs: list[tuple[int, bytearray]] = []

    def write(self, data: Any) -> int:
        content = bytes(data)
        if self._runs and self._runs[-1][0] + len(self._runs[-1][1]) == self.at:
            self._runs[-1][1].extend(content)
        else:
            self._runs.append((self.at, bytearray(content)))
        self.at += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = 0) -> int:
        assert whence == 1 and offset >= 0, "torch seeks forward over the values only"
        if offset:
            self.skipped.append((self.at, offset))
        self.at += offset
        return self.at

    def tell(self) -> int:
        return self.at

    def flush(self) -> None: ...

    def literals(self) -> list[tuple[int, bytes]]:
        return [(offset, bytes(content)) for offset, content in self._runs]
