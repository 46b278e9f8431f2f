"""RMSNorm, SwiGLU and RoPE: values and gradients against the formula in fp64."""

from __future__ import annotations

import pytest
import torch

from swift_dist.kernels import rms_norm, rope, swiglu
from tests.kernels.compare import agree, equal_but_for_rounding, random

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
SHAPES = [(3, 5, 48), (1, 33), (2, 1, 3), (0, 16), (7, 130)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(shape, dtype, offset, backend, device):
    def formula(x, weight):
        scale = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return x * scale * (weight + offset)

    inputs = [
        random(*shape, dtype=dtype, device=device, scale=3.0),
        random(shape[-1], dtype=dtype, device=device, seed=1),
    ]
    agree(lambda x, w: rms_norm.rms_norm(x, w, 1e-5, offset=offset, backend=backend), formula, inputs)


def test_rms_norm_rounds_as_the_models_do(backend, device):
    x = random(64, 96, dtype=torch.bfloat16, device=device)
    weight = random(96, dtype=torch.bfloat16, device=device, seed=1)
    normalized = x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    llama = weight * normalized.bfloat16()
    gemma = (normalized * (1 + weight.float())).bfloat16()
    assert equal_but_for_rounding(rms_norm.rms_norm(x, weight, 1e-6, backend=backend), llama)
    found = rms_norm.rms_norm(x, weight, 1e-6, offset=1.0, rounds_before_weight=False, backend=backend)
    assert equal_but_for_rounding(found, gemma)
    assert not torch.equal(llama, (normalized * weight.float()).bfloat16())  # the two ways differ on this input


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (5, 700)])
def test_swiglu(shape, dtype, backend, device):
    inputs = [random(*shape, dtype=dtype, device=device, seed=seed, scale=4.0) for seed in (0, 1)]
    agree(
        lambda gate, up: swiglu.swiglu(gate, up, backend=backend), lambda gate, up: gate * gate.sigmoid() * up, inputs
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch,heads,kv_heads,length,width", [(2, 3, 1, 5, 8), (1, 4, 4, 1, 2), (1, 6, 2, 7, 24)])
@pytest.mark.parametrize("shares_angles", [True, False])
def test_rope(batch, heads, kv_heads, length, width, shares_angles, dtype, backend, device):
    angles = random(1 if shares_angles else batch, length, width // 2, dtype=torch.float64, device=device, scale=3.0)
    angles = torch.cat((angles, angles), -1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    inputs = [
        random(batch, heads, length, width, dtype=dtype, device=device),
        random(batch, kv_heads, length, width, dtype=dtype, device=device, seed=1),
    ]

    def formula(query, key):
        half = width // 2
        c, s = cos[:, None, :, :half].double(), sin[:, None, :, :half].double()
        pairs = [torch.complex(x[..., :half], x[..., half:]) * torch.complex(c, s) for x in (query, key)]
        return tuple(torch.cat((pair.real, pair.imag), -1) for pair in pairs)

    agree(lambda query, key: rope.rope(query, key, cos, sin, backend=backend), formula, inputs)
    # heads of a projection: [B, T, heads, d] seen as [B, heads, T, d]
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs]
    whole = rope.rope(*inputs, cos, sin, backend=backend)
    for found, expected in zip(rope.rope(*strided, cos, sin, backend=backend), whole, strict=True):
        assert torch.equal(found, expected)


def test_rope_of_transformers_is_the_same(backend, device):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    query, key = (random(2, heads, 6, 16, dtype=torch.float32, device=device, seed=heads) for heads in (4, 2))
    angles = random(2, 6, 8, dtype=torch.float32, device=device, seed=9)
    angles = torch.cat((angles, angles), -1)
    expected = apply_rotary_pos_emb(query, key, angles.cos(), angles.sin())
    for found, right in zip(rope.rope(query, key, angles.cos(), angles.sin(), backend=backend), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-6)


def test_what_does_not_fit_is_refused(device):
    with pytest.raises(ValueError, match="do not fit together"):
        rms_norm.rms_norm(torch.ones(2, 3, device=device), torch.ones(4, device=device), 1e-6)
    with pytest.raises(ValueError, match="one shape and dtype"):
        swiglu.swiglu(torch.ones(2, 3), torch.ones(3, 2))
    query, angles = torch.ones(4, 1, 3, 4), torch.ones(1, 3, 4)
    for shapes in [
        (query, query, torch.ones(1, 2, 4), torch.ones(1, 2, 4)),
        (query, torch.ones(4, 1, 5, 4), angles, angles),  # a kernel would read beyond the angles
        (query, torch.ones(4, 1, 3, 8), angles, angles),
        (query, query, torch.ones(2, 3, 4), torch.ones(2, 3, 4)),
        (query, query, angles, torch.ones(1, 3, 2)),
    ]:
        with pytest.raises(ValueError, match="do not fit together"):
            rope.rope(*shapes)


def test_halves_of_one_tensor(backend, device):
    """Gate and up of one product: read where they lie, with the other half between two rows."""
    both = random(3, 4, 22, dtype=torch.float64, device=device)
    agree(
        lambda tensor: swiglu.swiglu(*tensor.chunk(2, -1), backend=backend),
        lambda tensor: tensor[..., :11] * tensor[..., :11].sigmoid() * tensor[..., 11:],
        [both],
    )
    assert swiglu.swiglu(both[..., :0], both[..., :0], backend=backend).shape == (3, 4, 0)


def test_angles_whose_halves_differ(backend, device):
    cos, sin = (random(2, 5, 8, dtype=torch.float64, device=device, seed=seed) for seed in (7, 8))
    inputs = [random(2, heads, 5, 8, dtype=torch.float64, device=device, seed=heads) for heads in (3, 1)]

    def formula(*tensors):
        return tuple(x * cos[:, None] + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin[:, None] for x in tensors)

    agree(lambda query, key: rope.rope(query, key, cos, sin, backend=backend), formula, inputs)


def test_dtypes_are_those_of_the_models(backend, device):
    """Float32 weights and angles beside bf16 activations, which autocast brings about."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    x = random(2, 3, 4, 16, dtype=torch.bfloat16, device=device)
    for kind, options in ((LlamaRMSNorm, {}), (Gemma3RMSNorm, {"offset": 1.0, "rounds_before_weight": False})):
        norm = kind(16, eps=1e-6).to(device)
        torch.nn.init.normal_(norm.weight)
        expected = norm(x)
        found = rms_norm.rms_norm(x, norm.weight, 1e-6, **options, backend=backend)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)  # compares dtypes too
        found.float().square().sum().backward()
        assert norm.weight.grad is not None and norm.weight.grad.dtype == torch.float32
    angles = random(1, 4, 16, dtype=torch.float32, device=device)
    expected, _ = apply_rotary_pos_emb(x, x, angles.cos(), angles.sin())
    leaf = x.clone().requires_grad_()
    found, _ = rope.rope(leaf, x, angles.cos(), angles.sin(), backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    found.sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == torch.bfloat16
