"""Block-wise FP8 of weights: e4m3 numbers with one float32 factor a block, as DeepSeek-V3 stores them (2412.19437).

    factor[i, j] = max |w| over block (i, j) / 448,  q = round_e4m3(w / factor),  w' = q factor

A block of zeros has factor 1. Blocks at the edges may be smaller. The factors are what checkpoints call
``weight_scale_inv``.
"""

from __future__ import annotations

import torch

from swift_dist.kernels._triton import Backend, jit, on_triton, power_of_two, tl

LARGEST = 448.0
"""The largest number of float8_e4m3fn."""


def quantise_reference(weight: torch.Tensor, block: tuple[int, int] = (128, 128)) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula in plain torch."""
    _check(weight, block)
    tiled = _tiled(weight.float(), block)
    factors = tiled.abs().amax(dim=(1, 3)) / LARGEST
    factors = torch.where(factors == 0, 1.0, factors)
    scaled = (tiled / factors[:, None, :, None]).clamp(-LARGEST, LARGEST)
    whole = scaled.reshape(tiled.shape[0] * block[0], tiled.shape[2] * block[1])
    return whole[: weight.shape[0], : weight.shape[1]].to(torch.float8_e4m3fn).contiguous(), factors


def dequantise_reference(
    quantised: torch.Tensor,
    factors: torch.Tensor,
    block: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The formula in plain torch."""
    _check(quantised, block, factors)
    rows, columns = quantised.shape
    wide = factors.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return (quantised.float() * wide).to(dtype)


def quantise(
    weight: torch.Tensor, block: tuple[int, int] = (128, 128), *, backend: Backend = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights to e4m3 and factors.

    Args:
        weight: floating [R, C], finite.
        block: rows and columns of a block; powers of two for the kernel, others are done in plain torch, as all are on
            GPUs before compute capability 8.9.

    Returns:
        float8_e4m3fn [R, C], float32 [ceil(R / rows), ceil(C / columns)].

    Raises:
        ValueError: not a matrix, or not finite.
    """
    _check(weight, block)
    if not bool(weight.isfinite().all()):
        raise ValueError("the weights hold nan or infinities")
    if not _kernel_fits(block, weight) or not on_triton(backend, weight):
        return quantise_reference(weight, block)
    weight = weight.contiguous()
    rows, columns = weight.shape
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    quantised = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    factors = torch.empty(grid, dtype=torch.float32, device=weight.device)
    if weight.numel():
        _quantise_kernel[grid](weight, quantised, factors, rows, columns, ROWS=block[0], COLUMNS=block[1])
    return quantised, factors


def dequantise(
    quantised: torch.Tensor,
    factors: torch.Tensor,
    block: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
    *,
    backend: Backend = "auto",
) -> torch.Tensor:
    """e4m3 and factors to weights of `dtype`, rounded once. Shapes as in `quantise`.

    Raises:
        ValueError: factors of another number of blocks, or values that are not e4m3.
    """
    if quantised.dtype != torch.float8_e4m3fn:
        raise ValueError(f"values of {quantised.dtype}: should be float8_e4m3fn")
    _check(quantised, block, factors)
    if not _kernel_fits(block, quantised) or not on_triton(backend, quantised):
        return dequantise_reference(quantised, factors, block, dtype)
    rows, columns = quantised.shape
    out = torch.empty(quantised.shape, dtype=dtype, device=quantised.device)
    if quantised.numel():
        _dequantise_kernel[tuple(factors.shape)](
            quantised.contiguous(), factors.contiguous(), out, rows, columns, ROWS=block[0], COLUMNS=block[1]
        )
    return out


def _kernel_fits(block: tuple[int, int], tensor: torch.Tensor) -> bool:
    if tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) < (8, 9):
        return False  # Triton has no e4m3 for an A100
    return all(size == power_of_two(size) for size in block) and block[0] * block[1] <= 128 * 128


def _check(weight: torch.Tensor, block: tuple[int, int], factors: torch.Tensor | None = None) -> None:
    if weight.dim() != 2 or min(block) < 1:
        raise ValueError(f"{tuple(weight.shape)} in blocks of {block}: a matrix and positive blocks are needed")
    blocks = tuple(-(-extent // size) for extent, size in zip(weight.shape, block, strict=True))
    if factors is not None and tuple(factors.shape) != blocks:
        raise ValueError(f"{tuple(weight.shape)} in blocks of {block} has {blocks} factors, not {tuple(factors.shape)}")


def _tiled(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[block rows, rows, block columns, columns], filled up with zeros."""
    rows, columns = (-extent % size for extent, size in zip(weight.shape, block, strict=True))
    padded = torch.nn.functional.pad(weight, (0, columns, 0, rows))
    return padded.view(padded.shape[0] // block[0], block[0], padded.shape[1] // block[1], block[1])


@jit
def _rounded(x):
    """To the nearest number of e4m3, halves to even, still float32: Triton's own conversion rounds on a GPU, cuts in
    some of its versions and loses a carry under its interpreter."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000  # 3 of 23 bits after the point
    tiny = (x + 24576.0) - 24576.0  # 1.5 x 2^14: multiples of 2^-9, the step below 2^-6
    return tl.where(tl.abs(x) < 0.015625, tiny, bits.to(tl.float32, bitcast=True))


@jit
def _quantise_kernel(weight, quantised, factors, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.max(tl.max(tl.abs(w), 1), 0) / 448.0
    factor = tl.where(factor == 0, 1.0, factor)
    scaled = tl.minimum(tl.maximum(w / factor, -448.0), 448.0)
    tl.store(quantised + at, _rounded(scaled).to(tl.float8e4nv), mask=inside)
    tl.store(factors + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), factor)


@jit
def _dequantise_kernel(quantised, factors, out, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    factor = tl.load(factors + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1))
    w = tl.load(quantised + at, mask=inside, other=0.0).to(tl.float32) * factor
    tl.store(out + at, w.to(out.dtype.element_ty), mask=inside)
