"""What cross entropy needs of a tile of logits, in one pass each: its normaliser, and its gradient written over it.

    z = x, or cap tanh(x / cap);  lse = log sum_v exp(z[v]);  picked = z[y] (0 where y is not in this tile's part)
    d x[v] = (a 1[v = y] + b exp(z[v] - lse)) (1 - (z[v] / cap)^2)

a and b are what a loss makes of them: a = g, b = -g for a log-probability whose gradient is g.
"""

from __future__ import annotations

import torch

from swift_dist.kernels._triton import Backend, compute_dtype, jit, on_triton, power_of_two, tl, tl_dtype

_BLOCK = 4096


def statistics(
    tile: torch.Tensor, labels: torch.Tensor, softcap: float | None = None, *, backend: Backend = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(lse, picked) of each row.

    Args:
        tile: floating [n, V], contiguous.
        labels: int64 [n]; outside [0, V): this tile does not hold the label (another rank's vocabulary does).
        softcap: logits become ``softcap * tanh(logits / softcap)``.

    Returns:
        Both float32 (float64 of float64) [n].
    """
    assert tile.is_contiguous() and labels.shape == tile.shape[:1]
    labels = labels.contiguous()
    dtype = compute_dtype(tile)
    if on_triton(backend, tile):
        lse = torch.empty(len(tile), dtype=dtype, device=tile.device)
        picked = torch.empty_like(lse)
        if len(tile):
            _statistics_kernel[(len(tile),)](
                tile, labels, lse, picked, tile.shape[1], softcap or 1.0,
                CAPPED=softcap is not None, WIDE=tl_dtype(dtype), BLOCK=min(_BLOCK, power_of_two(tile.shape[1])),
                num_warps=8,
            )  # fmt: skip
        return lse, picked
    wide = _capped(tile.to(dtype), softcap)
    here = (labels >= 0) & (labels < tile.shape[1])
    picked = wide.gather(1, torch.where(here, labels, 0)[:, None]).squeeze(1)
    return torch.logsumexp(wide, 1), torch.where(here, picked, 0.0)


def gradient_(
    tile: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    softcap: float | None = None,
    *,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Write the gradient over the logits.

    Args:
        tile, labels, softcap: as in `statistics`.
        lse, a, b: float32 (float64) [n].

    Returns:
        `tile`.
    """
    assert tile.is_contiguous()
    labels, lse = labels.contiguous(), lse.contiguous()
    a, b = a.contiguous(), b.contiguous()  # the gradient of a sum is one number, seen as many
    if on_triton(backend, tile):
        block = min(_BLOCK, power_of_two(tile.shape[1]))
        if len(tile):
            _gradient_kernel[(len(tile), -(-tile.shape[1] // block))](
                tile, labels, lse, a, b, tile.shape[1], softcap or 1.0,
                CAPPED=softcap is not None, WIDE=tl_dtype(lse.dtype), BLOCK=block, num_warps=8,
            )  # fmt: skip
        return tile
    wide = _capped(tile.to(lse.dtype, copy=True), softcap)
    slope = 1 - (wide / softcap).square_() if softcap is not None else None
    wide.sub_(lse[:, None]).exp_().mul_(b[:, None])
    here = ((labels >= 0) & (labels < tile.shape[1])).nonzero().squeeze(1)
    wide[here, labels[here]] += a[here]
    if slope is not None:
        wide.mul_(slope)
    return tile.copy_(wide)


def _capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


@jit
def _cap(x, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        # tanh through exp of what is never positive: nothing overflows
        e = tl.exp(-2.0 * tl.abs(x / softcap))
        x = tl.where(x < 0, -1.0, 1.0) * softcap * (1.0 - e) / (1.0 + e)
    return x


@jit
def _statistics_kernel(
    tile, labels, lse, picked, width, softcap, CAPPED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), dtype=WIDE)
    total = tl.zeros((BLOCK,), dtype=WIDE)
    for start in range(0, width, BLOCK):
        inside = start + column < width
        x = _cap(tl.load(tile + row * width + start + column, mask=inside, other=0.0).to(WIDE), softcap, CAPPED)
        x = tl.where(inside, x, float("-inf"))
        larger = tl.maximum(largest, x)
        base = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(largest - base) + tl.exp(x - base)
        largest = larger
    most = tl.max(largest, 0)
    total = tl.sum(total * tl.exp(largest - most), 0)
    tl.store(lse + row, most + tl.log(total))
    label = tl.load(labels + row)
    here = (label >= 0) & (label < width)
    x = tl.load(tile + row * width + label, mask=here, other=0.0).to(WIDE)
    tl.store(picked + row, tl.where(here, _cap(x, softcap, CAPPED), 0.0))


@jit
def _gradient_kernel(
    tile, labels, lse, a, b, width, softcap, CAPPED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    raw = tl.load(tile + row * width + column, mask=inside, other=0.0)
    x = _cap(raw.to(WIDE), softcap, CAPPED)
    gradient = tl.load(b + row) * tl.exp(x - tl.load(lse + row))
    gradient += tl.where(column == tl.load(labels + row), tl.load(a + row), 0.0)
    if CAPPED:
        gradient = gradient * (1.0 - (x / softcap) * (x / softcap))
    tl.store(tile + row * width + column, gradient.to(raw.dtype), mask=inside)
