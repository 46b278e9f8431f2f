"""Triton where it is installed, and the choice between a kernel and its plain-torch form.

A kernel's file can be imported without Triton: `jit` then leaves the function as it is, and nobody calls it. The same
kernels run on a CPU under Triton's interpreter (TRITON_INTERPRET=1 when the file is imported), which is how tests run
them; there they are called with ``backend="triton"``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

Backend = Literal["auto", "torch", "triton"]

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
    jit: Any = triton.jit
except ImportError:
    HAVE_TRITON = False
    triton = None
    tl: Any = None  # type: ignore[no-redef]

    def jit(function: Any) -> Any:
        return function


def on_triton(backend: Backend, tensor: torch.Tensor) -> bool:
    """Whether the kernel runs: on CUDA where Triton is installed, or because it was asked for by name."""
    if backend == "auto":
        return HAVE_TRITON and tensor.is_cuda
    if backend == "triton" and not HAVE_TRITON:
        raise RuntimeError("backend 'triton' was asked for, and triton is not installed")
    return backend == "triton"


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """What sums are taken in: float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def tl_dtype(dtype: torch.dtype) -> Any:
    """The Triton name of float32 or float64."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


def warps_for(block: int) -> int:
    """Warps of a program whose block has so many elements."""
    return 4 if block < 2048 else 8 if block < 8192 else 16
