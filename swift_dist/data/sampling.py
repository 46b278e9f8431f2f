"""Texts of an input, read in this process: all of them, or units spread evenly over it up to a number of bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from swift_dist.data.readers import BadRow, documents
from swift_dist.data.sources import ReadOptions, SourceFile, discover
from swift_dist.data.units import Stream, Unit, boundary_kind, plan, unit_size
from swift_dist.workers.progress import Progress


class Sample:
    """Attributes count what `texts` has given so far: documents, text_bytes, skipped (bad rows)."""

    def __init__(self, options: ReadOptions, max_bytes: int) -> None:
        self._options, self._max_bytes = options, max_bytes
        self._files: Sequence[SourceFile] = discover(options)
        self.documents = self.text_bytes = self.skipped = 0

    def texts(self) -> Iterator[str]:
        size = unit_size(self._files)
        units, streams = plan(self._files, self._options, size)
        total = sum(file.size for file in self._files)
        stride = max(1, -(-total // self._max_bytes))
        chosen = units[:: min(stride, max(1, len(units)))]
        with Progress("train-tokenizer", min(total, self._max_bytes)) as progress:
            for unit in chosen:
                yield from self._unit(unit, progress)
            for file in streams:
                stream = Stream(file, boundary_kind(file, self._options), size)
                number = 0
                while self.text_bytes < self._max_bytes and (piece := stream.next()) is not None:
                    if number % stride == 0:
                        yield from self._unit(piece, progress)
                    number += 1
                stream.close()

    def _unit(self, unit: Unit, progress: Progress) -> Iterator[str]:
        for row in documents(unit, self._options):
            if isinstance(row, BadRow):
                self.skipped += 1
                continue
            if self.text_bytes >= self._max_bytes:
                return
            self.documents += 1
            self.text_bytes += len(row.text.encode())
            yield row.text
        progress.add(unit.input_bytes)
