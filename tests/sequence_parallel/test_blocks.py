"""Blocks of attention: forwards, and backwards given the normaliser of all keys.

What is called on CUDA is checked without a GPU: arguments by torch's own dispatcher, numbers by stand-ins with the
shapes and limits of CUDA's kernels."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swift_dist.sequence_parallel import blocks
from swift_dist.sequence_parallel.blocks import Mask

ATEN = torch.ops.aten


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _ask(op: Any, *arguments: Any, **named: Any) -> None:
    """The dispatcher's opinion of the arguments, on meta tensors."""
    op(*map(_meta, arguments), **named)


def _scores(q: Any, k: Any, bias: Any, causal: bool, scale: float) -> torch.Tensor:
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias.double()
    if causal:
        assert q.shape[2] == k.shape[2]
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    return scores


def _gradients(d: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, bias: Any, causal: bool, scale: float) -> Any:
    weights = torch.exp(_scores(q, k, bias, causal, scale) - lse.double()[..., None])
    of_scores = weights * (d.double() @ v.double().transpose(-1, -2) - (d.double() * o.double()).sum(-1, keepdim=True))
    results = of_scores @ k.double(), of_scores.transpose(-1, -2) @ q.double(), weights.transpose(-1, -2) @ d.double()
    return (results[0] * scale).to(q.dtype), (results[1] * scale).to(k.dtype), results[2].to(v.dtype)


class Flash:
    """Groups of heads, widths that are multiples of 8, half precision."""

    @staticmethod
    def forward(q: Any, k: Any, v: Any, dropout: float, causal: bool, debug: bool, *, scale: float) -> Any:
        _ask(ATEN._scaled_dot_product_flash_attention.default, q, k, v, dropout, causal, debug, scale=scale)
        assert q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
        groups = q.shape[1] // k.shape[1]
        k, v = (tensor.repeat_interleave(groups, 1) for tensor in (k, v))
        scores = _scores(q, k, None, causal, scale)
        out = (scores.softmax(-1) @ v.double()).to(q.dtype)
        return out, scores.logsumexp(-1).float(), None, None, q.shape[2], k.shape[2], None, None, None

    @staticmethod
    def backward(*arguments: Any, scale: float) -> Any:
        _ask(ATEN._scaled_dot_product_flash_attention_backward.default, *arguments, scale=scale)
        d, q, k, v, o, lse, cum_q, cum_k, max_q, max_k, dropout, causal, seed, offset = arguments
        assert cum_q is None and cum_k is None and (max_q, max_k, dropout) == (q.shape[2], k.shape[2], 0.0)
        assert q.shape[-1] % 8 == 0 and lse.shape == q.shape[:3] and lse.is_contiguous() and lse.dtype == torch.float32
        assert seed.dtype == offset.dtype == torch.uint64 and seed.shape == (2,)
        groups = q.shape[1] // k.shape[1]
        wide = [tensor.repeat_interleave(groups, 1) for tensor in (k, v)]
        dq, *others = _gradients(d, q, *wide, o, lse, None, causal, scale)
        return dq, *(tensor.unflatten(1, (-1, groups)).double().sum(2).to(k.dtype) for tensor in others)


class Efficient:
    """As many heads of keys as of queries; normalisers in rows of 32, filled with infinity; aligned biases."""

    @staticmethod
    def _check(q: Any, k: Any, bias: Any) -> None:
        assert q.shape[1] == k.shape[1] and q.shape[-1] % (8 if q.dtype != torch.float32 else 4) == 0
        if bias is not None:
            assert bias.dtype == q.dtype and bias.shape == (1, q.shape[1], q.shape[2], k.shape[2])
            assert bias.stride(2) % 16 == 0 and bias.stride(3) == 1

    @staticmethod
    def forward(
        q: Any, k: Any, v: Any, bias: Any, computes_lse: bool, dropout: float, causal: bool, *, scale: Any
    ) -> Any:
        op = ATEN._scaled_dot_product_efficient_attention.default
        _ask(op, q, k, v, bias, computes_lse, dropout, causal, scale=scale)
        Efficient._check(q, k, bias)
        scores = _scores(q, k, bias, causal, scale)
        lse = torch.nn.functional.pad(scores.logsumexp(-1), (0, -q.shape[2] % 32), value=math.inf).float()
        assert computes_lse and lse.shape == op(*map(_meta, (q, k, v, bias)), True, 0.0, causal, scale=scale)[1].shape
        return (scores.softmax(-1) @ v.double()).to(q.dtype), lse, None, None

    @staticmethod
    def backward(*arguments: Any, scale: float) -> Any:
        _ask(ATEN._scaled_dot_product_efficient_attention_backward.default, *arguments, scale=scale)
        d, q, k, v, bias, o, lse, _, _, dropout, wanted, causal = arguments
        Efficient._check(q, k, bias)
        assert dropout == 0.0 and wanted == [True, True, True, False]
        assert lse.shape[-1] % 32 == 0 and lse.is_contiguous() and bool((lse[..., q.shape[2] :] == math.inf).all())
        return (*_gradients(d, q, k, v, o, lse[..., : q.shape[2]], bias, causal, scale), None)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = {"flash": Flash, "efficient": Efficient}
    named = {f"_scaled_dot_product_{name}_attention": staticmethod(op.forward) for name, op in ops.items()}
    named |= {f"_scaled_dot_product_{name}_attention_backward": staticmethod(op.backward) for name, op in ops.items()}
    monkeypatch.setattr(blocks, "_ATEN", SimpleNamespace(**{name: op.__func__ for name, op in named.items()}))
    monkeypatch.setattr(blocks, "_on_cuda", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        request.getfixturevalue("cuda")
    return str(request.param)


def _masks(queries: int, keys: int) -> list[Mask]:
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    return [Mask(), *([Mask(causal=True)] if queries == keys else []), Mask(seen=(distance >= 0) & (distance < 5))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 20])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (33, 40)])
def test_shares_of_two_sets_of_keys_add_up(
    device: str, dtype: torch.dtype, width: int, queries: int, keys: int
) -> None:
    """Two blocks of keys with the normaliser of both: outputs merge and gradients add up to those of one attention."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    query, dout, scale = random(4, queries, width), random(4, queries, width), width**-0.5
    for mask in _masks(queries, keys):
        sets = [(random(2, keys, width), random(2, keys, width)) for _ in range(2)]
        masks = [mask, Mask()]
        parts = [blocks.forward(query, *held, seen, scale) for held, seen in zip(sets, masks, strict=True)]
        lse = torch.logaddexp(*(part[1].float() for part in parts))
        out = sum(torch.exp(part[1].float() - lse)[..., None] * part[0].float() for part in parts)
        found = [
            blocks.backward(dout, query, *held, out.to(dtype), lse, seen, scale)  # type: ignore[union-attr]
            for held, seen in zip(sets, masks, strict=True)
        ]

        leaves = [tensor.double().requires_grad_() for tensor in (query, *sets[0], *sets[1])]
        whole_k, whole_v = (torch.cat((leaves[1 + i], leaves[3 + i]), 1).repeat_interleave(2, 0) for i in (0, 1))
        bias = torch.zeros(queries, 2 * keys, dtype=torch.float64)
        seen = mask.seen if mask.seen is not None else ~torch.ones(queries, keys).triu(1).bool()
        if mask.causal or mask.seen is not None:
            bias[:, :keys].masked_fill_(~seen, -math.inf)
        expected = torch.nn.functional.scaled_dot_product_attention(leaves[0], whole_k, whole_v, bias, scale=scale)
        expected.backward(dout.double())
        tolerance = 2e-5 if dtype == torch.float32 else 4e-2
        assert parts[0][0].dtype == dtype and parts[0][1].shape == (4, queries)
        got = [out, sum(share[0] for share in found), *found[0][1:], *found[1][1:]]
        for mine, right in zip(got, [expected, *(leaf.grad for leaf in leaves)], strict=True):
            assert mine.shape == right.shape  # type: ignore[union-attr]
            assert float((mine.double() - right).detach().abs().max()) <= tolerance * float(right.detach().abs().max())  # type: ignore


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("capability", "dtype", "width", "masked", "expected"),
    [
        ((9, 0), torch.bfloat16, 128, False, True),
        ((9, 0), torch.bfloat16, 256, False, True),
        ((8, 9), torch.bfloat16, 256, False, False),
        ((9, 0), torch.bfloat16, 320, False, False),
        ((7, 5), torch.float16, 128, False, False),
        ((9, 0), torch.float32, 128, False, False),
        ((9, 0), torch.bfloat16, 128, True, False),
    ],
)
def test_when_flash_is_called(capability, dtype, width, masked, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    mask = Mask(seen=torch.ones(2, 2, dtype=torch.bool)) if masked else Mask()
    assert blocks._flash_does(torch.zeros(1, 2, width, dtype=dtype), mask) == expected
