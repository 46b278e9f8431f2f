"""Kernels run under Triton's interpreter: the same code, on the CPU. Where tests have a GPU, they are compiled."""

from __future__ import annotations

import os

import pytest
import torch

# Triton looks at it when a kernel is decorated, that is when its file is imported; what tests start must not inherit it
_BEFORE = os.environ.get("TRITON_INTERPRET")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
try:
    from swift_dist.kernels import (  # noqa: F401
        block_fp8,
        linear_cross_entropy,
        lse_merge,
        rms_norm,
        rope,
        slots,
        softmax_tiles,
        swiglu,
        zigzag,
    )
    from swift_dist.kernels._triton import HAVE_TRITON
finally:
    os.environ.pop("TRITON_INTERPRET", None)
    if _BEFORE is not None:
        os.environ["TRITON_INTERPRET"] = _BEFORE


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
