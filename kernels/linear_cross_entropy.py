"""The output layer and the cross entropy together, some rows at a time: logits [T, V] never exist.

    z_i = W h_i + bias,  lse_i = log sum_v exp(z_i[v]),  logp_i = z_i[y_i] - lse_i
    d z_i = dlogp_i (onehot(y_i) - p_i) + dlse_i p_i,  p_i = exp(z_i - lse_i)
    dh = dz W,  dW = dz^T h

Two forms. `linear_logps` gives log-probabilities, with gradient, to any objective; backward computes a tile's logits
again (4 products with W in all). `linear_cross_entropy` is the loss itself: what a token's gradient will be is known in
the forward pass, so both gradients are made there and 3 products do (as Liger-Kernel, arXiv 2410.10989).

Vocabulary-parallel: each rank of `group` holds rows [rank V/n, (rank + 1) V/n) of W, as Megatron's output layer does
(arXiv 1909.08053), and the same h. Normalisers and label logits are joined over the group; dh is its sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from swift_dist.kernels._triton import Backend, compute_dtype
from swift_dist.kernels.softmax_tiles import gradient_, statistics

if TYPE_CHECKING:
    import torch.distributed as dist

_LEAST_ROWS = 256
Pair = tuple[torch.Tensor, torch.Tensor]


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> Pair:
    """(logp, lse) by the formula in plain torch, on one rank, differentiated by autograd."""
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(compute_dtype(logits))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    lse = torch.logsumexp(logits, -1)
    return logits.gather(1, labels[:, None]).squeeze(1) - lse, lse


def linear_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    group: dist.ProcessGroup | None = None,
    rows: int | None = None,
    backend: Backend = "auto",
) -> Pair:
    """Log-probabilities of given tokens, and the normalisers (for a z-loss), both with gradient.

    Args:
        hidden: floating [N, H].
        weight: floating [V, H]; with `group` this rank's rows of it, as many on every rank.
        labels: int64 [N], each in [0, whole V).
        bias: floating [V].
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).
        group: ranks that share the vocabulary; None: it is whole here. Every rank calls with the same rows.
        rows: of a tile. Default: as many as make a tile about as large as `hidden`, at least 256.

    Returns:
        (logp, lse), each float32 (float64 of float64) [N].

    Raises:
        ValueError: shapes, dtypes or options do not fit. RuntimeError: a label is none of the vocabulary (on CUDA when
            the device comes to it).
    """
    hidden, weight, bias = _as_products_take(hidden, weight, bias)
    _check(hidden, weight, labels, bias, softcap)
    _check_labels(labels, weight, group)
    result: Pair = _LinearLogps.apply(hidden, weight, bias, labels, softcap, group, rows, backend)
    return result


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    token_weights: torch.Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    group: dist.ProcessGroup | None = None,
    rows: int | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """sum_i w_i (-logp_i + z_loss lse_i^2), over the tokens whose label is not `ignore_index`.

    The sum, not a mean: divide by the weight of the global batch. Args as in `linear_logps`, and

        token_weights: floating [N], w (a template's loss_scale); None: 1. No gradient flows into them.
        z_loss: factor of the squared normaliser (PaLM, arXiv 2204.02311).

    Returns:
        float32 (float64 of float64) scalar.

    Raises:
        As `linear_logps`.
    """
    hidden, weight, bias = _as_products_take(hidden, weight, bias)
    _check(hidden, weight, labels, bias, softcap)
    if token_weights is not None and token_weights.shape != labels.shape:
        raise ValueError(f"token_weights {tuple(token_weights.shape)}: should be {tuple(labels.shape)}, as the labels")
    kept = (labels != ignore_index).nonzero().squeeze(1)
    if len(kept) < len(labels):
        hidden, labels = hidden[kept], labels[kept]
        token_weights = None if token_weights is None else token_weights[kept]
    _check_labels(labels, weight, group)
    dtype = compute_dtype(hidden)
    weights = hidden.new_ones(len(labels), dtype=dtype) if token_weights is None else token_weights.detach().to(dtype)
    result: torch.Tensor = _LinearCrossEntropy.apply(
        hidden, weight, bias, labels, weights, z_loss, softcap, group, rows, backend
    )
    return result


def _as_products_take(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Under autocast, cast as it would cast them for a matrix product: the backward pass, which runs outside of it,
    must compute the logits again as they were."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
) -> None:
    if hidden.dim() != 2 or weight.shape[1:] != hidden.shape[1:] or labels.shape != hidden.shape[:1]:
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}"
        raise ValueError(f"{shapes}: should be [N, H], [V, H] and [N]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)}: should be {tuple(weight.shape[:1])}")
    dtypes = {tensor.dtype for tensor in (hidden, weight, bias) if tensor is not None}
    if len(dtypes) > 1:
        raise ValueError(f"hidden, weight and bias are of several dtypes: {', '.join(sorted(map(str, dtypes)))}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap {softcap}: should be above 0")


def _check_labels(labels: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """A label that no rank holds would have logit 0. Waits for nothing on CUDA."""
    vocabulary = len(weight)
    if group is not None:
        import torch.distributed as dist

        vocabulary *= dist.get_world_size(group)
    if len(labels):
        inside = ((labels >= 0) & (labels < vocabulary)).all()
        torch._assert_async(inside, f"labels should be in [0, {vocabulary})")


class _Tiles:
    """Tiles of rows of one call, and the sums over the group."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        softcap: float | None,
        group: dist.ProcessGroup | None,
        rows: int | None,
        backend: Backend,
    ) -> None:
        self.hidden, self.weight, self.bias, self.softcap = hidden, weight, bias, softcap
        self.group, self.backend = group, backend
        self.labels = labels
        if group is not None:
            import torch.distributed as dist

            self.labels = labels - dist.get_rank(group) * len(weight)
        # Each tile costs a product with W and a pass over dW: tiles as large as the hidden states themselves are small
        # beside what else a model keeps of a token, and large enough for the products
        size = rows or max(_LEAST_ROWS, len(hidden) * hidden.shape[1] // len(weight))
        self.slices = [slice(start, start + size) for start in range(0, len(hidden), size)]

    def logits(self, part: slice) -> torch.Tensor:
        """[n, V of this rank] of the hidden states' dtype."""
        return F.linear(self.hidden[part], self.weight, self.bias)

    def statistics(self, logits: torch.Tensor, part: slice) -> Pair:
        """(lse, picked) [n] of the whole vocabulary."""
        lse, picked = statistics(logits, self.labels[part], self.softcap, backend=self.backend)
        if self.group is not None:
            import torch.distributed as dist

            dist.all_reduce(picked, group=self.group)
            largest = lse.clone()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
            lse = torch.exp(lse - largest)
            dist.all_reduce(lse, group=self.group)
            lse = lse.log_().add_(largest)
        return lse, picked

    def gradient(self, logits: torch.Tensor, part: slice, lse: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
        """Of the logits, over the logits."""
        return gradient_(logits, self.labels[part], lse, a, b, self.softcap, backend=self.backend)


class _Gradients:
    """Of hidden, weight and bias, tile by tile; None for what needs none. Those of half-precision weights are summed in
    float32: a tile's part is rounded once, not the running sum as often as there are tiles."""

    def __init__(self, tiles: _Tiles, needs: tuple[bool, ...]) -> None:
        hidden, weight, bias = tiles.hidden, tiles.weight, tiles.bias
        self._tiles = tiles
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        self.weight = torch.zeros_like(weight, dtype=compute_dtype(weight)) if needs[1] else None
        self.bias = torch.zeros_like(bias, dtype=compute_dtype(bias)) if bias is not None and needs[2] else None

    def add(self, part: slice, of_logits: torch.Tensor) -> None:
        if self.hidden is not None:
            torch.mm(of_logits, self._tiles.weight, out=self.hidden[part])
        if self.weight is not None:
            if self.weight.dtype == of_logits.dtype:
                self.weight.addmm_(of_logits.T, self._tiles.hidden[part])
            else:
                self.weight += of_logits.T @ self._tiles.hidden[part]
        if self.bias is not None:
            self.bias += of_logits.sum(0, dtype=self.bias.dtype)

    def finished(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        if self.hidden is not None and self._tiles.group is not None:
            import torch.distributed as dist

            dist.all_reduce(self.hidden, group=self._tiles.group)
        bias = self._tiles.bias
        return (
            self.hidden,
            None if self.weight is None else self.weight.to(self._tiles.weight.dtype),
            None if self.bias is None or bias is None else self.bias.to(bias.dtype),
        )


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, labels: Any, *options: Any) -> Pair:
        tiles = _Tiles(hidden, weight, bias, labels, *options)
        logp = torch.empty(len(hidden), dtype=compute_dtype(hidden), device=hidden.device)
        lse = torch.empty_like(logp)
        for part in tiles.slices:
            lse[part], picked = tiles.statistics(tiles.logits(part), part)
            logp[part] = picked - lse[part]
        ctx.save_for_backward(hidden, weight, bias, labels, lse)
        ctx.options = options
        return logp, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logp: torch.Tensor, of_lse: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, labels, lse = ctx.saved_tensors
        tiles = _Tiles(hidden, weight, bias, labels, *ctx.options)
        gradients = _Gradients(tiles, ctx.needs_input_grad)
        of_lse = of_lse - of_logp
        for part in tiles.slices:
            gradients.add(part, tiles.gradient(tiles.logits(part), part, lse[part], of_logp[part], of_lse[part]))
        return (*gradients.finished(), None, None, None, None, None)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Any, weight: Any, bias: Any, labels: Any, weights: Any, z_loss: float, *options: Any
    ) -> torch.Tensor:
        tiles = _Tiles(hidden, weight, bias, labels, *options)
        gradients = _Gradients(tiles, ctx.needs_input_grad)
        loss = torch.zeros((), dtype=weights.dtype, device=hidden.device)
        for part in tiles.slices:
            logits = tiles.logits(part)
            lse, picked = tiles.statistics(logits, part)
            w = weights[part]
            loss += (w * (lse - picked + z_loss * lse.square())).sum()
            gradients.add(part, tiles.gradient(logits, part, lse, -w, w * (1 + 2 * z_loss * lse)))
        ctx.save_for_backward(*gradients.finished())
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        scaled = [None if held is None else _scaled(held, gradient) for held in ctx.saved_tensors]
        return (*scaled, None, None, None, None, None, None, None)


def _scaled(held: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The product, rounded once: a factor in half precision would put the same error into every number. Some rows at a
    time, since the gradient of an output layer is large."""
    result = torch.empty_like(held)
    for target, part in zip(result.split(_LEAST_ROWS), held.split(_LEAST_ROWS), strict=True):
        target.copy_(part.to(compute_dtype(part)) * factor)
    return result
