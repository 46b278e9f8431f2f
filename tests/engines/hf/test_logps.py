"""Log-probabilities of tokens: those of log_softmax, in chunks, without a float32 copy of the logits."""

from __future__ import annotations

import weakref

import pytest
import torch

from swift_dist.engines.hf import logps
from swift_dist.engines.hf.logps import token_logps


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(logps, "CHUNK_ELEMENTS", 7 * 101)  # 7 rows of the vocabulary below


def make(shape: tuple[int, ...] = (3, 11), dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Logits with large values among them, labels, and the gradient that comes back."""
    generator = torch.Generator().manual_seed(0)
    logits = 10 * torch.randn(*shape, 101, generator=generator)
    labels = torch.randint(0, 101, shape, generator=generator)
    return logits.to(dtype), labels, torch.randn(shape, generator=generator)


def reference(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, labels[..., None]).squeeze(-1)


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("shape", [(33,), (3, 11), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_those_of_log_softmax(dtype, shape, reuse):
    logits, labels, gradient = make(shape, dtype)
    found, expected = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    values, wanted = token_logps(found * 1, labels, reuse_logits=reuse), reference(expected * 1, labels)
    assert values.dtype == torch.float32 and values.shape == labels.shape
    torch.testing.assert_close(values, wanted, rtol=1e-6, atol=1e-6)
    values.backward(gradient)
    wanted.backward(gradient)
    # Half precision: both round the same float32 numbers once, which differ in their last digits.
    tolerance = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(found.grad, expected.grad, rtol=tolerance, atol=1e-6)


def test_gradients_by_finite_differences():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(9, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.randint(0, 5, (9,), generator=generator)
    assert torch.autograd.gradcheck(lambda x: token_logps(x, labels), (logits,))


def test_no_tokens_still_reach_the_model():
    """A rank with nothing to learn takes part in the backward pass all the same."""
    weight = torch.ones(4, 101, requires_grad=True)
    values = token_logps(torch.ones(0, 4) @ weight, torch.zeros(0, dtype=torch.int64))
    values.sum().backward()
    assert values.shape == (0,) and weight.grad.abs().sum() == 0


def test_nothing_of_the_logits_size_is_kept_beside_the_logits():
    logits, labels, _ = make(dtype=torch.bfloat16)
    logits = logits.requires_grad_() * 1
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        token_logps(logits, labels)
    large = [t for t in held if t.numel() >= logits.numel()]
    assert [t.data_ptr() for t in large] == [logits.data_ptr()]
    assert max(t.numel() for t in held if t.numel() < logits.numel()) == labels.numel()


def test_reuse_writes_the_gradient_over_the_logits_and_a_second_backward_raises():
    logits, labels, gradient = make()
    logits = logits.requires_grad_() * 1
    place, grads = logits.data_ptr(), []
    logits.register_hook(lambda g: grads.append(g.data_ptr()))
    values = token_logps(logits, labels, reuse_logits=True)
    values.backward(gradient, retain_graph=True)
    assert grads == [place]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        values.backward(gradient)


def test_reuse_is_seen_by_whoever_else_needs_the_logits():
    """An error, not wrong gradients."""
    logits, labels, gradient = make()
    logits = logits.requires_grad_() * 1
    squares = logits.square().sum()  # made before ours: its backward, which reads the logits, runs after ours
    values = token_logps(logits, labels, reuse_logits=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward([squares, values], [torch.ones(()), gradient])


def test_a_leaf_keeps_its_values():
    logits, labels, gradient = make()
    leaf = logits.clone().requires_grad_()
    token_logps(leaf, labels, reuse_logits=True).backward(gradient)
    assert torch.equal(leaf.detach(), logits)


def test_without_gradient_nothing_is_kept():
    logits, labels, _ = make()
    kept = weakref.ref(logits)
    with torch.no_grad():
        values = token_logps(logits, labels)
    del logits
    assert kept() is None and not values.requires_grad
