"""Output layer and cross entropy in tiles: against whole logits in fp64; memory; one vocabulary over several ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from swift_dist.kernels.linear_cross_entropy import linear_cross_entropy, linear_logps, reference
from tests.kernels.compare import TOLERANCES, agree, difference, random

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def _inputs(rows, width, vocabulary, dtype, device, *, bias=False):
    scale = width**-0.5
    inputs = [
        random(rows, width, dtype=dtype, device=device),
        random(vocabulary, width, dtype=dtype, device=device, seed=1, scale=3 * scale),
    ]
    if bias:
        inputs.append(random(vocabulary, dtype=dtype, device=device, seed=2))
    labels = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(3)).to(device)
    return inputs, labels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [None, 4])
def test_logps(dtype, softcap, bias, rows, backend, device):
    inputs, labels = _inputs(13, 24, 50, dtype, device, bias=bias)

    def ours(hidden, weight, bias=None):
        return linear_logps(hidden, weight, labels, bias=bias, softcap=softcap, rows=rows, backend=backend)

    agree(ours, lambda hidden, weight, bias=None: reference(hidden, weight, labels, bias, softcap), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss(dtype, softcap, z_loss, weighted, backend, device):
    inputs, labels = _inputs(13, 24, 50, dtype, device, bias=True)
    labels[[2, 7, 12]] = -100
    weights = random(13, dtype=torch.float32, device=device, seed=4).abs() if weighted else None

    def ours(hidden, weight, bias):
        return linear_cross_entropy(
            hidden, weight, labels,
            token_weights=weights, z_loss=z_loss, bias=bias, softcap=softcap, rows=5, backend=backend,
        )  # fmt: skip

    def formula(hidden, weight, bias):
        logits = F.linear(hidden, weight, bias)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
        losses = losses + z_loss * torch.logsumexp(logits, -1).square() * (labels != -100)
        return (losses if weights is None else losses * weights.double()).sum()

    agree(ours, formula, inputs)


def test_no_token_counts(backend, device):
    inputs, labels = _inputs(6, 8, 12, torch.float32, device)
    tensors = [tensor.requires_grad_() for tensor in inputs]
    loss = linear_cross_entropy(*tensors, torch.full_like(labels, -100), backend=backend)
    loss.backward()
    assert loss == 0 and all(tensor.grad is not None and not tensor.grad.any() for tensor in tensors)


def test_a_frozen_weight_gets_no_gradient(backend, device):
    (hidden, weight), labels = _inputs(6, 8, 12, torch.float32, device)
    hidden.requires_grad_()
    logp, _ = linear_logps(hidden, weight, labels, backend=backend)
    (-logp.sum()).backward()
    expected = hidden.detach().double().requires_grad_()
    (-reference(expected, weight.double(), labels)[0].sum()).backward()
    assert weight.grad is None and difference(hidden.grad, expected.grad) < 5e-6


def test_large_logits_do_not_overflow(backend, device):
    (hidden, weight), labels = _inputs(8, 16, 40, torch.float32, device)
    agree(
        lambda h, w: linear_logps(h, w, labels, backend=backend),
        lambda h, w: reference(h, w, labels),
        [hidden * 300, weight],
    )


def test_no_tensor_of_all_logits(device):
    """The largest tensor that is made: seen by the dispatcher, forwards and backwards. (Tiles are the same with the
    kernels, which allocate nothing themselves; Triton's interpreter does.)"""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return result

    rows, width, vocabulary = 96, 8, 64
    inputs, labels = _inputs(rows, width, vocabulary, torch.float32, device)
    for function in (linear_logps, linear_cross_entropy):
        tensors = [tensor.clone().requires_grad_() for tensor in inputs]
        with Largest() as seen:
            result = function(*tensors, labels, rows=8)
            (result[0] if isinstance(result, tuple) else result).sum().backward()
        assert seen.elements <= max(rows * width, vocabulary * width, 8 * vocabulary)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_vocabulary_over_several_ranks(world_size, tmp_path):
    file = Path(__file__).with_name("vocabulary_rank.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(file), str(tmp_path), str(rank), str(world_size)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        for rank in range(world_size)
    ]
    try:
        for rank in ranks:
            output, _ = rank.communicate(timeout=120)
            assert rank.returncode == 0, output
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_shapes_that_do_not_fit(device):
    with pytest.raises(ValueError, match="should be"):
        linear_logps(torch.ones(3, 4), torch.ones(5, 3), torch.zeros(3, dtype=torch.int64))
    hidden, weight, labels = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(3, dtype=torch.int64)
    for wrong in ({"bias": torch.ones(4)}, {"bias": torch.ones(5, dtype=torch.float64)}, {"softcap": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            linear_logps(hidden, weight, labels, **wrong)
    with pytest.raises(ValueError, match="token_weights"):
        linear_cross_entropy(hidden, weight, labels, token_weights=torch.ones(1))


@pytest.mark.parametrize("label", [-100, 5])
def test_a_label_that_is_none_is_refused(label):
    """Its logit would be 0. (On CUDA the device says so, and cannot be used afterwards.)"""
    hidden, weight = torch.ones(3, 4), torch.ones(5, 4)
    labels = torch.tensor([0, label, 4])
    with pytest.raises(RuntimeError, match=r"\[0, 5\)"):
        linear_logps(hidden, weight, labels)
    with pytest.raises(RuntimeError, match=r"\[0, 5\)"):
        linear_cross_entropy(hidden, weight, labels, ignore_index=-1)


def test_under_autocast_both_passes_see_the_same_logits(backend, device):
    """The backward pass runs outside of autocast, and computes logits again: a token's probabilities must still add up
    to one, so that of the gradient of the bias nothing is left."""
    (hidden, weight, bias), labels = _inputs(16, 32, 50, torch.float32, device, bias=True)
    tensors = [tensor.requires_grad_() for tensor in (hidden, weight * 10, bias)]
    with torch.autocast(device.type, torch.bfloat16):
        logps, _ = linear_logps(hidden, tensors[1], labels, bias=bias, backend=backend)
    assert logps.dtype == torch.float32
    logps.sum().backward()
    expected = torch.nn.functional.one_hot(labels, 50).sum(0)
    probabilities = torch.softmax(F.linear(*(tensor.detach().bfloat16() for tensor in tensors)).float(), -1)
    torch.testing.assert_close(bias.grad, expected - probabilities.sum(0), rtol=1e-2, atol=6e-3)


def test_a_factor_does_not_bias_half_precision_gradients(backend, device):
    """A loss divided by its tokens: 1/643 in bf16 is 0.2 % off, and so would be every gradient."""
    inputs, labels = _inputs(40, 24, 50, torch.bfloat16, device)
    whole, part = ([tensor.clone().requires_grad_() for tensor in inputs] for _ in range(2))
    linear_cross_entropy(*whole, labels, backend=backend).backward()
    (linear_cross_entropy(*part, labels, backend=backend) / 643).backward()
    for one, other in zip(whole, part, strict=True):
        ratio = (other.grad.double() * one.grad.double()).sum() / one.grad.double().square().sum()
        assert abs(float(ratio) * 643 - 1) < 5e-4


def test_tolerances_are_of_each_dtype():
    assert set(DTYPES) <= set(TOLERANCES)
