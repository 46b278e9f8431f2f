from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

for folder in ("engines", "golden", "support"):  # the ranks load these files by path too
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))


@pytest.fixture(scope="session")
def gang() -> Iterator[object]:
    from gang import Gang

    ranks = Gang()
    yield ranks
    ranks.close()
