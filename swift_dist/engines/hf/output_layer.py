"""An output layer that gives log-probabilities of given tokens instead of logits, which never exist as a whole.

The layer's `forward` is replaced, so whatever a strategy hangs on the module (FSDP2's and ZeRO-3's gathering of its
weight, forwards and backwards) goes on as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from swift_dist.errors import RunError
from swift_dist.kernels.linear_cross_entropy import linear_logps


class TiledOutput:
    """Installed on a model by `install`.

    Args:
        layer: the model's output layer.
    """

    def __init__(self, layer: Any) -> None:
        self._layer, self._logits = layer, layer.forward
        self._wanted: tuple[torch.Tensor, torch.Tensor] | None = None
        self._made: torch.Tensor | None = None
        layer.forward = self._forward

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._wanted is None:
            return self._logits(hidden)
        chosen, labels = self._wanted
        rows = hidden[chosen][: len(labels)]
        logps, _ = linear_logps(rows, self._layer.weight, labels, bias=self._layer.bias)
        self._made = logps
        return logps

    @contextlib.contextmanager
    def of(self, chosen: torch.Tensor, labels: torch.Tensor) -> Iterator[None]:
        """Around a forward pass whose logits are to be log-probabilities.

        Args:
            chosen: bool [b, K], which of the positions that reach the layer are wanted.
            labels: int64 [N], their tokens.
        """
        self._wanted = (chosen, labels)
        try:
            yield
        finally:
            self._wanted = self._made = None

    def checked(self, output: torch.Tensor) -> torch.Tensor:
        """What the model returned as logits, which must be what the layer gave. Inside `of`.

        Raises:
            RunError: the model does something to its logits (a softcap, a scale), which log-probabilities do not know.
        """
        if self._made is None or output.shape != self._made.shape or output.data_ptr() != self._made.data_ptr():
            raise RunError("the model changes what its output layer gives", "--train.tiled_loss false")
        return output


def install(model: Any) -> TiledOutput | None:
    """A model's output layer in tiles; None where it has no plain one, or changes its logits afterwards."""
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    config = model.config.get_text_config()
    changed = [getattr(config, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")]
    if type(layer) is not torch.nn.Linear or any(value not in (None, 1, 1.0) for value in changed):
        return None
    return TiledOutput(layer)
