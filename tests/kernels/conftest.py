"""Kernels run under Triton's interpreter: the same code, on the CPU. Where tests have a GPU, they are compiled.

(`tests/support/interpreted_kernels.py` imports them so.)
"""

from __future__ import annotations

import pytest
import torch

from swift_dist.kernels._triton import HAVE_TRITON


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton" and not HAVE_TRITON:
        pytest.skip("triton is not installed (it has no wheels for this platform)")
    return str(request.param)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton looks once more when a kernel runs."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
