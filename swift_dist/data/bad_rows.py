"""Bad rows as people look them up: file:line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from swift_dist.data.readers import BadRow

_READ = 1 << 22


def describe(rows: Sequence[BadRow]) -> list[str]:
    """``path:line: reason`` for each, lines from 1; ``path: row n: reason`` for tables, rows from 1.

    Lines of a file that was read in pieces are counted here, in one pass over each such file.
    """
    bases: dict[str, set[int]] = {}
    for row in rows:
        if row.base >= 0:
            bases.setdefault(row.file, set()).add(row.base)
    before = {file: newlines_before(Path(file), sorted(wanted)) for file, wanted in bases.items()}
    texts = []
    for row in rows:
        number = row.line + 1 + (before[row.file][row.base] if row.base >= 0 else 0)
        texts.append(f"{row.file}: row {number}: {row.reason}" if row.table else f"{row.file}:{number}: {row.reason}")
    return texts


def newlines_before(path: Path, offsets: Sequence[int]) -> dict[int, int]:
    """How many newlines stand before each byte of a file, in one pass. offsets: ascending."""
    counts, count, at = {}, 0, 0
    with path.open("rb") as stream:
        for offset in offsets:
            while at < offset:
                block = stream.read(min(_READ, offset - at))
                if not block:
                    break
                at, count = at + len(block), count + block.count(b"\n")
            counts[offset] = count
    return counts
