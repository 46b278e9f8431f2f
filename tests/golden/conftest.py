from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# importlib import mode has no package for tests; the ranks load these files by path too.
for folder in ("golden", "support"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))


@pytest.fixture(scope="session")
def gang() -> Iterator[object]:
    assert importlib.util.find_spec("gang") is not None
    from gang import Gang

    ranks = Gang()
    yield ranks
    ranks.close()
