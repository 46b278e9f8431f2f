"""Imports the kernels for Triton's interpreter, where there is no GPU: the same code, on the CPU.

Triton looks at TRITON_INTERPRET when a kernel is decorated, that is when its file is first imported in a process. So
this comes before any test that imports one; what tests start must not inherit the variable.
"""

from __future__ import annotations

import os

import torch

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
finally:
    os.environ.pop("TRITON_INTERPRET", None)
    if _BEFORE is not None:
        os.environ["TRITON_INTERPRET"] = _BEFORE
