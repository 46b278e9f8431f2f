"""A model's MLPs some tokens at a time, forwards and backwards: their wide intermediate values [T, ffn] never exist.

    Y = [mlp(X_1); ...; mlp(X_n)],  dX_i and dW_i by autograd of mlp(X_i), computed again,  dW = sum_i dW_i

An MLP looks at one token at a time, so it can be cut along the tokens (ALST, arXiv 2506.13996). What a layer keeps of
it is its input alone; in the backward pass one tile at a time is computed again and differentiated.

No collective depends on the number of tiles. FSDP2 gathers whole layers, around their MLPs; ZeRO-3, which gathers each
matrix when it is used, is told to gather an MLP at once (`gather_whole`). Otherwise a rank with more tokens, hence more
tiles, would wait for ever in a gathering that the others do not take part in, and all ranks of the world would have to
agree on one number. Each weight's gradient comes out of one node, once, as the reducers of every strategy expect.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from swift_dist.config import JobConfig
from swift_dist.errors import JobError, RunError

log = logging.getLogger(__name__)

_NAMES = ("mlp", "feed_forward")
"""What transformers' decoder layers call them."""


class TiledMLP:
    """Stands in the place of an MLP's `forward`, so that hooks on the module run once, around all tiles. It holds the
    forward as a bound method: a copy of the module (LLaMA-Pro's new layers) calls its own weights.

    Args:
        module: whose output has its input's shape, and whose tokens do not meet.
        tokens: of a tile.
    """

    def __init__(self, module: torch.nn.Module, tokens: int) -> None:
        self.module, self.tokens = module, tokens
        self._whole = module.forward
        self._dtypes: dict[Any, torch.dtype] = {}

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., h] -> [..., h]."""
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        if rows.shape[1] <= self.tokens:
            return self._whole(hidden)
        dtype = self._dtype(rows)
        learning = [weight for weight in self.module.parameters() if weight.requires_grad]
        if torch.is_grad_enabled() and (rows.requires_grad or learning):
            out: torch.Tensor = _Tiles.apply(self, dtype, rows, *learning)
        else:
            out = torch.empty_like(rows, dtype=dtype)
        # Filled behind the node, not in it. A node's input is kept after its forward has ended: where the layer is
        # recomputed, torch stops there, at the last tensor that the backward pass needs, and what follows is left out.
        # So with train.recompute the MLP is computed twice, as without tiles, instead of three times.
        with torch.no_grad():
            filled = out.detach()
            for part in self.parts(rows):
                filled[:, part] = self._whole(rows[:, part])
        return out.view(hidden.shape)

    def parts(self, rows: torch.Tensor) -> list[slice]:
        """Of the tokens."""
        return [slice(start, start + self.tokens) for start in range(0, rows.shape[1], self.tokens)]

    def _dtype(self, rows: torch.Tensor) -> torch.dtype:
        """Of the output (autocast makes it another one than the input's), found with one token."""
        key = (rows.dtype, *_autocast(rows.device.type).values())
        if key not in self._dtypes:
            devices, _ = get_device_states(rows)
            with torch.no_grad(), torch.random.fork_rng(devices, device_type=rows.device.type):
                found = self._whole(rows[:, :1])
            if not isinstance(found, torch.Tensor) or found.shape != rows[:, :1].shape:
                raise RunError(
                    f"{type(self.module).__name__} does not map each token to one of the same width",
                    "--train.tiled_mlp false",
                )
            self._dtypes[key] = found.dtype
        return self._dtypes[key]

    def gradients(self, rows: torch.Tensor, of_out: torch.Tensor, wanted: list[bool]) -> list[torch.Tensor | None]:
        """Of the rows and of each weight that learns, where `wanted`. Those of half-precision weights are summed in
        float32: a tile's part is rounded once, not the running sum as often as there are tiles."""
        learning = [weight for weight in self.module.parameters() if weight.requires_grad]
        chosen = [weight for weight, is_wanted in zip(learning, wanted[1:], strict=True) if is_wanted]
        of_rows = torch.empty_like(rows) if wanted[0] else None
        sums: list[torch.Tensor | None] = [None] * len(chosen)
        for number, part in enumerate(self.parts(rows)):
            tile = rows[:, part].detach().requires_grad_(wanted[0])
            with torch.enable_grad():
                out = self._whole(tile)
            inputs = [*([tile] if wanted[0] else []), *chosen]
            found = list(torch.autograd.grad(out, inputs, of_out[:, part], allow_unused=True))
            if of_rows is not None:
                of_rows[:, part] = found.pop(0)
            for index, gradient in enumerate(found):
                if gradient is not None:
                    sums[index] = _added(sums[index], gradient, in_place=number > 1)
            del out, tile, found  # before the next tile is computed
        summed = iter(
            None if total is None else total.to(weight.dtype) for total, weight in zip(sums, chosen, strict=True)
        )
        return [of_rows, *(next(summed) if is_wanted else None for is_wanted in wanted[1:])]


def _added(total: torch.Tensor | None, gradient: torch.Tensor, *, in_place: bool) -> torch.Tensor:
    """Not in place where `total` is what autograd gave, which may be somebody else's too."""
    if total is None:
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return total.add_(gradient) if in_place else total + gradient


class _Tiles(torch.autograd.Function):
    """rows [1, T, h] and the weights that learn -> [1, T, h], not yet filled."""

    @staticmethod
    def forward(
        ctx: Any, mlp: TiledMLP, dtype: torch.dtype, rows: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.mlp, ctx.autocast = mlp, _autocast(rows.device.type)
        ctx.random = torch.get_rng_state(), *get_device_states(rows)
        ctx.save_for_backward(rows)
        return torch.empty_like(rows, dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: torch.Tensor) -> tuple[Any, ...]:
        (rows,) = ctx.saved_tensors
        device = rows.device.type
        with _random_as(ctx.random, device), torch.autocast(device, **ctx.autocast):
            return None, None, *ctx.mlp.gradients(rows, of_out, ctx.needs_input_grad[2:])


def _autocast(device_type: str) -> dict[str, Any]:
    """How it stands now, as arguments of ``torch.autocast``."""
    return {
        "enabled": torch.is_autocast_enabled(device_type),
        "dtype": torch.get_autocast_dtype(device_type),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }


@contextlib.contextmanager
def _random_as(state: tuple[torch.Tensor, list[int], list[torch.Tensor]], device_type: str) -> Iterator[None]:
    """An adapter's dropout draws what it drew in the forward pass."""
    of_cpu, devices, of_devices = state
    with torch.random.fork_rng(devices, device_type=device_type):
        torch.set_rng_state(of_cpu)
        set_device_states(devices, of_devices, device_type=device_type)
        yield


def tile(model: torch.nn.Module, job: JobConfig) -> None:
    """Tile a job's MLPs: by default where ranks share rows and layers are recomputed, which makes it cost nothing.

    Raises:
        JobError: it is asked for and the model has no dense MLP.
    """
    by_default = job.parallel.context_parallel_size > 1 and job.train.recompute == "full"
    wanted = job.train.tiled_mlp
    if (by_default if wanted is None else wanted) and not install(model) and wanted:
        raise JobError(
            "train.tiled_mlp",
            f"{type(model).__name__} has no feed-forward block that is made of linear layers alone",
            "leave it out",
        )


def install(model: torch.nn.Module) -> int:
    """Let the model's dense MLPs compute as many tokens at a time as the model is wide: a tile's intermediate values
    are then about as large as the MLP's weights.

    Blocks of experts stay whole: they deal the tokens out among themselves, and a tile would leave each expert few.
    Before tuners change the model.

    Returns:
        How many MLPs that are.
    """
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] in _NAMES]
    dense = [module for module in found if _is_dense(module)]
    config: Any = model.config
    for module in dense:
        module.forward = TiledMLP(module, config.get_text_config().hidden_size)
    if dense and len(dense) < len(found):
        log.info("%d of %d feed-forward blocks are no plain MLPs and stay whole", len(found) - len(dense), len(found))
    return len(dense)


def _is_dense(module: torch.nn.Module) -> bool:
    """Linear layers and transformers' activations alone, of one tensor: nothing in which tokens meet."""
    from transformers.pytorch_utils import Conv1D

    for part in module.modules():
        has_state = next(part.parameters(recurse=False), next(part.buffers(recurse=False), None)) is not None
        of_activation = type(part).__module__ == "transformers.activations"
        if has_state and not isinstance(part, (torch.nn.Linear, Conv1D)) and not of_activation:
            return False
    linear = [part for part in module.modules() if isinstance(part, (torch.nn.Linear, Conv1D))]
    return len(linear) > 1 and len(inspect.signature(module.forward).parameters) == 1


def gather_whole(model: torch.nn.Module) -> None:
    """Have ZeRO-3 gather each tiled MLP at once, and reduce its gradients when all of it is done. Before
    ``deepspeed.initialize``."""
    from deepspeed.utils import set_z3_leaf_module

    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), TiledMLP):
            set_z3_leaf_module(module, True)
            module.register_forward_pre_hook(_with_gradient)


def _with_gradient(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """ZeRO-3 takes a leaf module's gradients for finished when its input's is: there must be one (where nothing below
    learns, they would be taken before they exist, as zeros)."""
    hidden = arguments[0]
    if torch.is_grad_enabled() and not hidden.requires_grad:
        return (hidden.detach().requires_grad_(), *arguments[1:])
    return arguments
