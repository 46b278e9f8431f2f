from __future__ import annotations

from pathlib import Path

import pytest

from tests.tuners.tiny import tiny_folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models by their kind."""
    root = tmp_path_factory.mktemp("bases")
    return {kind: tiny_folder(root / kind, kind) for kind in ("llama", "qwen2", "classifier", "mixtral")}
