"""What ddp and fsdp2 share: torch's optimizer over weights that carry their own gradients."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from swift_dist.engines.hf.strategies._clip import LossScale, clip_factor, local, multiply, sum_of_squares
from swift_dist.engines.hf.strategies._state import OptimizedWeights
from swift_dist.engines.hf.strategies.base import Setting
from swift_dist.errors import RunError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchStrategy:
    """The part of `Strategy` that does not depend on where weights lie.

    A weight is moved by its optimizer where it has a gradient. Those without one (frozen in this step, or not used by
    any rank) stay as they are, with their moments, as in one process.

    Args:
        model: whose weights lie where they are to stay.
        setting: see there.
        replica: this rank's number among those that hold the same.
    """

    module: torch.nn.Module

    def __init__(self, model: torch.nn.Module, setting: Setting, replica: int) -> None:
        self.model, self.device, self.group = model, setting.device, setting.group
        self._clip_grad = setting.job.optimizer.clip_grad
        fp16 = setting.job.train.precision == "fp16"
        self._scale = LossScale(setting.job.train.initial_loss_scale) if fp16 else None
        self.optimizer = setting.make_optimizer(setting.parameter_groups(model))
        self._optimized = OptimizedWeights(model, self.optimizer, replica)
        self._weights = self._optimized.weights
        self._frozen = [(n, p) for n, p in model.named_parameters() if n not in self._weights]
        self._last_norm: float | None = None
        self._most_gradients = 0

    @property
    def loss_scale(self) -> float | None:
        return None if self._scale is None else self._scale.value

    @contextlib.contextmanager
    def accumulate(self, is_last: bool) -> Iterator[None]:
        if self._last_norm is not None:
            raise RunError("gradients of a step were neither used nor dropped", "report it as a defect")
        self._require_known()
        with self._reducing(is_last):
            yield
        self._most_gradients = max(self._most_gradients, num_bytes(self._held_gradients()))

    def _reducing(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Around a micro-batch; when the last one's ends, every weight's ``grad`` is the sum over ranks."""
        raise NotImplementedError

    def _sum_over_shards(self, squares: torch.Tensor) -> None:
        """Add up, in place, what ranks with other parts of the gradients have."""

    def backward(self, loss: torch.Tensor) -> None:
        (loss if self._scale is None else loss * self._scale.value).backward()

    @torch.no_grad()
    def gradient_norm(self) -> float:
        squares = sum_of_squares(self._gradients(), self.device)
        self._sum_over_shards(squares)
        self._last_norm = math.sqrt(squares.item()) / (self.loss_scale or 1.0)
        return self._last_norm

    @torch.no_grad()
    def update(self, lr: float, gradient_norm: float) -> None:
        assert self._last_norm is not None, "gradient_norm comes first"
        multiply(self._gradients(), clip_factor(gradient_norm, self._clip_grad) / (self.loss_scale or 1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.step()
        if self._scale is not None:
            self._scale.after_update()
        self._drop()

    def skip(self) -> None:
        if self._scale is not None and self._last_norm is not None and not math.isfinite(self._last_norm):
            self._scale.after_overflow()
        self._drop()

    def _drop(self) -> None:
        self._last_norm = None
        for weight in self._weights.values():
            weight.grad = None

    def _gradients(self) -> list[torch.Tensor]:
        return [weight.grad for weight in self._weights.values() if weight.grad is not None]

    def _held_gradients(self) -> Iterable[torch.Tensor]:
        return self._gradients()

    def _require_known(self) -> None:
        """What learns now must be among what the optimizer was made for.

        Raises:
            RunError: it is not; its gradients would be summed and never used.
        """
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                raise RunError(f"{name} learns now, but did not when the optimizer was made", "report it as a defect")

    def sharded_state(self, is_loading: bool) -> dict[str, Any]:
        state = self._optimized.collect(is_loading)
        counts = state.pop("counts")
        return {**state, "numbers": {"counts": counts, "loss_scale": self._scale and self._scale.state()}}

    def load_sharded_state(self, state: dict[str, Any]) -> None:
        numbers = state["numbers"]
        self._optimized.take_over(state, numbers["counts"])
        if self._scale is not None and numbers["loss_scale"] is not None:
            self._scale.load(numbers["loss_scale"])

    @torch.no_grad()
    def whole_weights(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        state, is_first = self.model.state_dict(), dist.get_rank() == 0
        for name in names:
            whole = self._whole(state[name].detach())
            if is_first:
                yield name, whole.to("cpu", copy=True)

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def held_bytes(self) -> dict[str, int]:
        state = [t for s in self.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
        return {
            "parameters": num_bytes(self.model.parameters()),
            "gradients": self._most_gradients,
            "optimizer": num_bytes(state),
        }

    def close(self) -> None:
        self.optimizer.state.clear()
        self.optimizer.param_groups.clear()
        for name in ("module", "model", "optimizer", "_optimized", "_weights", "_frozen", "group"):
            self.__dict__.pop(name, None)


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of this rank's parts: all their storages, each counted once."""
    storages = [local(tensor).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
