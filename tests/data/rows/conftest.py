from __future__ import annotations

import pytest

from swift_dist.data.rows import _records


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_records, "UNIT_BYTES", 300)
