"""Our core attention against the formula written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from swift_dist.engines.megatron import cpu_shim


@pytest.fixture(scope="module", autouse=True)
def shim() -> Any:
    undo = cpu_shim.apply()
    yield
    undo()


def core(**config: Any) -> Any:
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from swift_dist.engines.megatron.attention import DotProductAttention

    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
    settings = TransformerConfig(**{**sizes, "attention_dropout": 0.0, **config})
    return DotProductAttention(settings, 1, AttnMaskType.causal, "self")


def formula(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
    """[s, b, n, d], [s, b, g, d] -> [s, b, n*d]; a query sees itself and `window` keys before it."""
    length, repeats = query.shape[0], query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(repeats, dim=2), value.repeat_interleave(repeats, dim=2)
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) / math.sqrt(query.shape[-1])
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance <= (length if window is None else window))
    probs = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("bnst,tbnd->sbnd", probs, value).flatten(2)


@pytest.mark.parametrize("window", [None, 0, 3, 40])
def test_attention_equals_the_formula(window: int | None) -> None:
    torch.manual_seed(0)
    shapes = [(17, 2, heads, 8) for heads in (4, 2, 2)]
    ours = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    module = core(window_size=None if window is None else (window, 0))
    output, expected = module(*ours, None), formula(*theirs, window)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(output)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_only_the_listed_layers_have_the_window() -> None:
    from megatron.core.transformer.enums import AttnMaskType

    module = core(window_size=(3, 0), window_attn_skip_freq=[0, 1])
    second = type(module)(module.config, 2, AttnMaskType.causal, "self")
    assert (module.window, second.window) == (-1, 3)


@pytest.mark.parametrize(("kind", "size"), [("RMSNorm", 1), ("LayerNorm", 2)])
def test_norm_equals_the_formula(kind: str, size: int) -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from swift_dist.engines.megatron.norm import Norm

    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2, normalization=kind)
    norm = Norm(config, 16, eps=1e-5)
    assert len(list(norm.parameters())) == size
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    x = torch.randn(5, 3, 16)
    centred = x - x.mean(-1, keepdim=True) if kind == "LayerNorm" else x
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    if norm.bias is not None:
        expected = expected + norm.bias
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-6)
