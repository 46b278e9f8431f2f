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


@pytest.fixture(scope="session")
def deepspeed_gang() -> Iterator[object]:
    """With DeepSpeed imported once, before ranks are forked."""
    import deepspeed_ranks
    from gang import Gang

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")  # found by itself, it says so on the forking process's standard output
        found = Gang(imports=deepspeed_ranks.IMPORTS)
    yield found
    found.close()
