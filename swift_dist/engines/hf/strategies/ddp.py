"""Data parallelism: every rank holds the whole model, gradients are summed over the ranks."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist

from swift_dist.engines.hf.strategies._reducer import Reducer
from swift_dist.engines.hf.strategies._torch import DTYPES, TorchStrategy
from swift_dist.engines.hf.strategies.base import Setting
from swift_dist.errors import RunError


class DDP(TorchStrategy):
    """See `swift_dist.engines.hf.strategies.base.Strategy`.

    Weights that learn are float32 and are their own masters; those that do not are held in the compute precision. In
    bf16 and fp16 the forward pass runs under autocast, which casts a matrix when it is used and keeps norms, softmax
    and the residual stream exact: 4 bytes (weight) + 8 (moments) + 4 (gradient) a learning weight for good, and 2 more
    from its use in the forward pass to the end of the backward pass. A lasting 16-bit copy would take those 2 all the
    time.

    Raises:
        RunError: a weight lies on the meta device.
    """

    def __init__(self, model: torch.nn.Module, setting: Setting) -> None:
        if any(parameter.is_meta for parameter in model.parameters()):
            raise RunError("strategy ddp takes a model with its weights, and this one is on the meta device")
        if any(parameter.device != setting.device for parameter in model.parameters()):
            model.to(setting.device)
        super().__init__(model, setting, replica=dist.get_rank(setting.group))
        precision = setting.job.train.precision
        self.module = model if precision == "fp32" else Autocast(model, setting.device.type, DTYPES[precision])
        alone = dist.get_world_size(setting.group) == 1
        self._reducer = None if alone else Reducer(self._weights.values(), setting.group)

    def _reducing(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        return self._reducer.reducing() if self._reducer and is_last else contextlib.nullcontext()

    def close(self) -> None:
        if self._reducer:
            self._reducer.close()
            self._reducer = None
        super().close()


class Autocast(torch.nn.Module):
    """A model whose forward pass computes matrix products in another precision.

    Args:
        model: called with the arguments that this is called with.
        device_type: of the model.
        dtype: bfloat16 or float16.
    """

    def __init__(self, model: torch.nn.Module, device_type: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self._device_type, self._dtype = model, device_type, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self._device_type, self._dtype):
            return self.model(*args, **kwargs)


STRATEGY = DDP
