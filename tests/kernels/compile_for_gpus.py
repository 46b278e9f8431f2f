"""Compiles every kernel for NVIDIA GPUs, which needs none: with the arguments that its own op launches it with.

python compile_for_gpus.py CAPABILITY ... DTYPE ...       (90 bf16: for H100 and H200)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from swift_dist.kernels import block_fp8, linear_cross_entropy, lse_merge, rms_norm, rope, softmax_tiles, swiglu, zigzag

MODULES = (softmax_tiles, lse_merge, zigzag, rms_norm, swiglu, rope, block_fp8)
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv",
}


class Compiler:
    """In the place of a kernel: compiles what is launched instead of running it."""

    def __init__(self, kernel: Any, capability: int, done: list[str]) -> None:
        self._kernel, self._capability, self._done = kernel, capability, done

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any, num_warps: int = 4, **constants: Any) -> None:
        values = {**dict(zip(self._kernel.arg_names, arguments, strict=False)), **constants}
        assert set(values) == set(self._kernel.arg_names), "the op's arguments are those of the kernel"
        signature = {name: "constexpr" if name in constants else _type(values[name]) for name in self._kernel.arg_names}
        compiled = triton.compile(
            ASTSource(self._kernel, signature, constants),
            target=GPUTarget("cuda", self._capability, 32),
            options={"num_warps": num_warps},
        )
        assert compiled.asm["cubin"] and compiled.metadata.shared <= 99 * 1024
        self._done.append(f"{self._kernel.fn.__module__.rpartition('.')[2]}.{self._kernel.fn.__name__}")


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def launch_all(dtype: torch.dtype, *, has_e4m3: bool) -> None:
    """Each op forwards and backwards: sizes of a large model where a block depends on them, few rows."""

    def leaf(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    labels = torch.zeros(2, dtype=torch.int64)
    for softcap in (None, 30.0):
        options: dict[str, Any] = {"softcap": softcap, "backend": "triton"}
        logps, lse = linear_cross_entropy.linear_logps(leaf(2, 8), leaf(5000, 8), labels, **options)
        (logps.sum() + lse.sum()).backward()
    lses = [torch.zeros(3, requires_grad=True) for _ in range(2)]
    out, _ = lse_merge.lse_merge(leaf(3, 128), lses[0], leaf(3, 128), lses[1], backend="triton")
    out.sum().backward()
    zigzag.shard(leaf(8, 4096), [8], 2, 0, backend="triton").sum().backward()
    for rounds in (True, False):
        rms_norm.rms_norm(
            leaf(2, 4096), leaf(4096), 1e-6, rounds_before_weight=rounds, backend="triton"
        ).sum().backward()
    swiglu.swiglu(leaf(2, 14336), leaf(2, 14336), backend="triton").sum().backward()
    cos, sin = torch.zeros(1, 2, 128), torch.zeros(1, 2, 128)
    query, key = rope.rope(leaf(1, 32, 2, 128), leaf(1, 8, 2, 128), cos, sin, backend="triton")
    (query.sum() + key.sum()).backward()
    if has_e4m3:
        quantised, factors = block_fp8.quantise(torch.zeros(130, 256, dtype=dtype), backend="triton")
        block_fp8.dequantise(quantised, factors, backend="triton", dtype=dtype)


def main(capabilities: list[int], dtypes: list[torch.dtype]) -> None:
    for capability in capabilities:
        done: list[str] = []
        kernels = {(m, n): k for m in MODULES for n, k in vars(m).items() if n.endswith("_kernel") and hasattr(k, "fn")}
        for (module, name), kernel in kernels.items():
            setattr(module, name, Compiler(kernel, capability, done))
        for dtype in dtypes:
            launch_all(dtype, has_e4m3=capability >= 89)
        for (module, name), kernel in kernels.items():
            setattr(module, name, kernel)
        missing = {f"{m.__name__.rpartition('.')[2]}.{n}" for m, n in kernels} - set(done)
        assert not missing or (capability < 89 and {name.split(".")[0] for name in missing} == {"block_fp8"}), missing
        print(f"sm_{capability}: {len(set(done))} kernels, {len(done)} launches")


if __name__ == "__main__":
    main(
        [int(word) for word in sys.argv[1:] if word.isdigit()],
        [dtype for dtype, name in _TYPES.items() if name in sys.argv[1:]],
    )
