"""Norms for machines without transformer-engine, with its parameter names, so that one checkpoint fits both.

transformer-engine folds the norm before a linear layer into that layer: `linear_qkv.layer_norm_weight` instead of
`input_layernorm.weight`. `NormColumnParallelLinear` does the same in plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig


class Norm(torch.nn.Module):
    """RMSNorm `y = x / sqrt(mean(x^2) + eps) * weight`, or LayerNorm with `bias`, over the last dimension.

    Under sequence parallelism each rank sees a part of the tokens, so the weight's gradient is a partial sum:
    `sequence_parallel=True` on the parameter makes megatron add it up over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.kind, self.eps = config.normalization, eps
        _check(config)
        self.weight = _parameter(config, hidden_size, 1.0)
        if self.kind == "LayerNorm":
            self.bias = _parameter(config, hidden_size, 0.0)
        else:
            self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _normalise(x, self.weight, self.bias, self.eps)


class NormColumnParallelLinear(ColumnParallelLinear):
    """`Y = norm(X) A^T + b` with A split by rows over the tensor-parallel ranks; the norm is not split.

    Parameters: `weight` [output/tp, input], `bias` [output/tp], `layer_norm_weight` [input] (and `layer_norm_bias`).
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        _check(config)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = _parameter(config, input_size, 1.0)
        if config.normalization == "LayerNorm":
            self.layer_norm_bias = _parameter(config, input_size, 0.0)
        else:
            self.register_parameter("layer_norm_bias", None)

    def forward(  # type: ignore[override]
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        normed = _normalise(input_, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        return super().forward(normed, weight, runtime_gather_output)


def _normalise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    if bias is not None:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def _parameter(config: TransformerConfig, size: int, value: float) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(
        torch.full((size,), value, dtype=config.params_dtype, device=torch.cuda.current_device())
    )
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


def _check(config: TransformerConfig) -> None:
    assert config.normalization in ("RMSNorm", "LayerNorm"), config.normalization
    assert not config.layernorm_zero_centered_gamma, "zero-centred norm weights need transformer-engine"
