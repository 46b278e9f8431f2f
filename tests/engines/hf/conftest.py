from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def gang() -> Iterator[object]:
    """As that of tests/engines, with what fine-tuning imports already there when ranks are forked."""
    import ranks
    from gang import Gang

    found = Gang(imports=ranks.IMPORTS)
    yield found
    found.close()
