"""The work on one chunk of a stream: a unit of a source becomes a small store. Runs inside a worker process."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from swift_dist.data.samples.merge import merge
from swift_dist.data.samples.store import DamagedStoreError, SampleStore, listed_unusable
from swift_dist.data.samples.stream import chunk_name
from swift_dist.data.samples.unit_encoder import Recipe, UnitEncoder, UnitId


@dataclass(frozen=True)
class ChunkFacts:
    """What the driver hears of a chunk that is there.

    Args:
        rows, samples, tokens: in it; pairs: rows of which the chosen answer alone is learnt.
        unusable: rows that cannot be used; left_out: rows without a sample, by reason.
        first_unusable: the first of them, a line each.
    """

    id: UnitId
    rows: int
    samples: int
    tokens: int
    pairs: int
    unusable: int
    left_out: dict[str, int]
    first_unusable: str


@dataclass(frozen=True)
class ChunkTask:
    """The task of the workers.

    Args:
        recipe: whose `parts` are the folders of each source's chunks.
    """

    recipe: Recipe

    def start(self) -> Callable[[UnitId], ChunkFacts]:
        encoder = self.recipe.encoder()
        return lambda unit: self._chunk(encoder, unit)

    def _chunk(self, encoder: UnitEncoder, unit: UnitId) -> ChunkFacts:
        """Make a chunk, if it is not there and whole."""
        target = Path(self.recipe.parts[unit.source]) / chunk_name(unit.unit)
        store = open_whole(target)
        paths = [segment.file.path for segment in self.recipe.units[unit.source][unit.unit].segments]
        if store is None:
            self._make(encoder, unit, target, paths)
            store = SampleStore(target)
        facts = store.facts
        first = listed_unusable(store, paths) if facts["unusable"] else ""
        return ChunkFacts(
            id=unit,
            rows=facts["rows"],
            samples=store.num_samples,
            tokens=store.num_tokens,
            pairs=facts["pairs"],
            unusable=facts["unusable"],
            left_out=facts["bad"],
            first_unusable=first,
        )

    def _make(self, encoder: UnitEncoder, unit: UnitId, target: Path, paths: list[str]) -> None:
        work = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}")
        part, folder = work / "part.npz", work / "store"
        shutil.rmtree(work, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            encoder.write(unit, part)
            merge(
                [part],
                folder,
                kind=self.recipe.kind,
                sequence_length=self.recipe.sequence_length,
                key="data.train",
                name=self.recipe.sources[unit.source].name,
                paths=paths,
            )
            if target.exists():
                target.rename(work / "damaged")
            try:
                folder.rename(target)
            except OSError:
                if open_whole(target) is None:  # else another run has made the same meanwhile
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)


def open_whole(path: Path) -> SampleStore | None:
    """The chunk, if it is there and unharmed."""
    try:
        return SampleStore(path, verify=True) if path.is_dir() else None
    except DamagedStoreError:
        return None
