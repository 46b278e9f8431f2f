"""What only a GPU can show: kernels compiled and run, at sizes of real models and beyond 2^31 elements; the ring's
blocks on torch's flash and memory-efficient kernels; models with kernels in their slots; fine-tuning of a long row.

`pytest -m gpu`. The other tests of this folder run their kernels compiled there, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from chat_model import conversations, save_chat_model, save_rows

from swift_dist.kernels import block_fp8, linear_cross_entropy, lse_merge, rms_norm, rope, slots, swiglu, zigzag
from swift_dist.sequence_parallel import blocks
from swift_dist.sequence_parallel.blocks import Mask
from swift_dist.sequence_parallel.ring import ring_attention
from tests.kernels.compare import agree, equal_but_for_rounding, random
from tests.kernels.test_slots import FAMILIES, close, counts, numbers, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
    pytest.mark.timeout(600),
]
CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GIB = 2**30


def needs_memory(gib: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"needs {gib:g} GiB of GPU memory, {free / GIB:.0f} are free")


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


# Each kernel at the sizes of an 8B model: values and gradients against the formula in fp64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("offset", "rounds"), [(0.0, True), (0.0, False), (1.0, False)])
@pytest.mark.parametrize("width", [4096, 5120, 16384])
def test_rms_norm(dtype: torch.dtype, offset: float, rounds: bool, width: int) -> None:
    def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm.rms_norm(x, weight, 1e-6, offset=offset, rounds_before_weight=rounds, backend="triton")

    def formula(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (weight + offset)

    inputs = [random(1000, width, dtype=dtype, device=CUDA), random(width, dtype=dtype, device=CUDA, seed=1)]
    agree(ours, formula, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    inputs = [random(500, 14336, dtype=dtype, device=CUDA, seed=seed, scale=4.0) for seed in (0, 1)]
    agree(lambda gate, up: swiglu.swiglu(gate, up, backend="triton"), lambda g, u: g * g.sigmoid() * u, inputs)
    agree(
        lambda both: swiglu.swiglu(*both.chunk(2, -1), backend="triton"),
        lambda both: both[:, :14336] * both[:, :14336].sigmoid() * both[:, 14336:],
        [random(300, 2 * 14336, dtype=dtype, device=CUDA)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 96, 128, 256])
def test_rope(dtype: torch.dtype, width: int) -> None:
    cos, sin = (random(2, 300, width, dtype=dtype, device=CUDA, seed=seed) for seed in (5, 6))

    def formula(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        half = width // 2
        turned = [torch.cat((-x[..., half:], x[..., :half]), -1) for x in tensors]
        return tuple(
            x * cos[:, None].double() + y * sin[:, None].double() for x, y in zip(tensors, turned, strict=True)
        )

    inputs = [random(2, heads, 300, width, dtype=dtype, device=CUDA, seed=heads) for heads in (32, 8)]
    agree(lambda q, k: rope.rope(q, k, cos, sin, backend="triton"), formula, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_linear_cross_entropy(dtype: torch.dtype, softcap: float | None) -> None:
    rows, width, vocabulary = 700, 1024, 128256
    inputs = [random(rows, width, dtype=dtype, device=CUDA)]
    inputs.append(random(vocabulary, width, dtype=dtype, device=CUDA, seed=1, scale=3 * width**-0.5))
    labels = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(2)).to(CUDA)

    def logps(hidden: torch.Tensor, weight: torch.Tensor) -> Any:
        return linear_cross_entropy.linear_logps(hidden, weight, labels, softcap=softcap, backend="triton")

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> Any:
        return linear_cross_entropy.linear_cross_entropy(hidden, weight, labels, softcap=softcap, backend="triton")

    def formula(hidden: torch.Tensor, weight: torch.Tensor) -> Any:
        return linear_cross_entropy.reference(hidden, weight, labels, softcap=softcap)

    agree(logps, formula, inputs)
    agree(loss, lambda hidden, weight: -formula(hidden, weight)[0].sum(), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lse_merge(dtype: torch.dtype) -> None:
    inputs = []
    for seed in (0, 2):
        inputs.append(random(32, 500, 128, dtype=dtype, device=CUDA, seed=seed))
        inputs.append(random(32, 500, dtype=torch.float32, device=CUDA, seed=seed + 1, scale=4.0))
    agree(lambda *tensors: lse_merge.lse_merge(*tensors, backend="triton"), lse_merge.reference, inputs)


def test_zigzag() -> None:
    lengths = [5000, 3, 1, 2997]
    row = random(sum(lengths), 4096, dtype=torch.bfloat16, device=CUDA)
    parts = [zigzag.shard(row, lengths, 4, rank, backend="triton") for rank in range(4)]
    assert torch.equal(zigzag.unshard(parts, lengths, backend="triton"), row)


@pytest.mark.parametrize("dtype", DTYPES)
def test_block_fp8(dtype: torch.dtype) -> None:
    weight = random(4100, 14336, dtype=dtype, device=CUDA)
    quantised, factors = block_fp8.quantise(weight, backend="triton")
    expected, right = block_fp8.quantise_reference(weight)
    assert torch.equal(factors, right) and torch.equal(quantised.float(), expected.float())
    back = block_fp8.dequantise(quantised, factors, dtype=dtype, backend="triton")
    assert equal_but_for_rounding(back, block_fp8.dequantise_reference(quantised, factors, dtype=dtype))


# Offsets beyond 2^31: the last rows, where a 32-bit offset would have wrapped, are those of the same rows alone

LONG = 2**31 + 2**24


def test_long_rows_of_heads() -> None:
    """Heads that lie one behind the other: a head's stride times its number is beyond 2^31."""
    needs_memory(40)
    heads, width = 32, 128
    length = LONG // heads // width
    query = torch.randn(1, heads, length, width, dtype=torch.bfloat16, device=CUDA)
    angles = torch.rand(1, length, width, device=CUDA)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    found, _ = rope.rope(query, query[:, :1], cos, sin, backend="triton")
    for part in (slice(0, 5), slice(length - 5, length)):
        expected, _ = rope.reference(
            query[:, :, part].double(), query[:, :1, part].double(), cos[:, part], sin[:, part]
        )
        torch.testing.assert_close(found[:, :, part].double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kernel", ["rms_norm", "swiglu", "lse_merge"])
def test_many_rows(kernel: str) -> None:
    needs_memory(60)
    width = {"rms_norm": 4096, "swiglu": 14336, "lse_merge": 128}[kernel]
    rows = LONG // width
    x = torch.randn(rows, width, dtype=torch.bfloat16, device=CUDA, requires_grad=True)
    last = x.detach()[-4:].clone().requires_grad_()
    lse = torch.randn(rows, device=CUDA)
    weight = torch.randn(width, dtype=torch.bfloat16, device=CUDA)

    def run(part: torch.Tensor, lses: torch.Tensor) -> torch.Tensor:
        if kernel == "rms_norm":
            return rms_norm.rms_norm(part, weight, 1e-6, backend="triton")
        if kernel == "swiglu":
            return swiglu.swiglu(part, part, backend="triton")
        return lse_merge.lse_merge(part, lses, part, -lses, backend="triton")[0]

    found, expected = run(x, lse), run(last, lse[-4:])
    assert torch.equal(found[-4:], expected)
    (gradient,) = torch.autograd.grad(found, x, torch.ones_like(found))
    (right,) = torch.autograd.grad(expected, last, torch.ones_like(expected))
    assert torch.equal(gradient[-4:], right)


def test_many_logits() -> None:
    """A tile of more than 2^31 logits."""
    needs_memory(60)
    vocabulary, width = 128256, 64
    rows = LONG // vocabulary
    hidden = torch.randn(rows, width, dtype=torch.bfloat16, device=CUDA, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=torch.bfloat16, device=CUDA) * 0.1
    labels = torch.randint(0, vocabulary, (rows,), device=CUDA)
    logps, _ = linear_cross_entropy.linear_logps(hidden, weight, labels, rows=rows, backend="triton")
    small, _ = linear_cross_entropy.linear_logps(hidden, weight, labels, rows=512, backend="triton")
    torch.testing.assert_close(logps, small, rtol=1e-4, atol=1e-3)
    for one, other in zip(*(torch.autograd.grad(part.sum(), hidden) for part in (logps, small)), strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


# The ring's blocks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [20, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_blocks(dtype: torch.dtype, width: int, kv_heads: int) -> None:
    """Flash (half precision) and the efficient kernel (float32, windows): normalisers, and shares of gradients given
    the normaliser of other keys, too."""
    heads, queries, scale = 8, 333, width**-0.5
    query, dout = (random(heads, queries, width, dtype=dtype, device=CUDA, seed=seed) for seed in (0, 1))
    distance = torch.arange(queries, device=CUDA)[:, None] - torch.arange(queries, device=CUDA)
    for mask in (Mask(), Mask(causal=True), Mask(seen=(distance >= 0) & (distance < 50))):
        sets = [
            [random(kv_heads, queries, width, dtype=dtype, device=CUDA, seed=seed + n) for n in (0, 1)]
            for seed in (2, 4)
        ]
        masks = [mask, Mask()]
        parts = [blocks.forward(query, *held, seen, scale) for held, seen in zip(sets, masks, strict=True)]
        out, lse = lse_merge.lse_merge(*parts[0], *parts[1])
        found = [
            blocks.backward(dout, query, *held, out.to(dtype), lse, seen, scale)
            for held, seen in zip(sets, masks, strict=True)
        ]
        leaves = [tensor.double().requires_grad_() for tensor in (query, *sets[0], *sets[1])]
        groups = heads // kv_heads
        keys, values = (torch.cat((leaves[1 + i], leaves[3 + i]), 1).repeat_interleave(groups, 0) for i in (0, 1))
        seen = mask.seen if mask.seen is not None else (distance >= 0) if mask.causal else distance > -queries
        scores = leaves[0] @ keys.transpose(1, 2) * scale
        scores = scores.masked_fill(~torch.cat((seen, torch.ones_like(seen)), 1), -torch.inf)
        expected = scores.softmax(-1) @ values
        expected.backward(dout.double())
        got = [out, found[0][0] + found[1][0], *found[0][1:], *found[1][1:]]
        limit = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
        torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=limit)
        for mine, right in zip(got, [expected, *(leaf.grad for leaf in leaves)], strict=True):
            assert float((mine.double() - right).detach().abs().max() / right.detach().abs().max()) <= limit


@pytest.mark.parametrize("window", [None, 100])
def test_ring_of_one(window: int | None, tmp_path: Path) -> None:
    """The whole of ring attention on NCCL, with the one rank that one GPU can hold."""
    lengths = [700, 1, 299]
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        chunks = [zigzag.chunks_of(lengths, 1, 0)]
        leaves = [
            random(heads, 1000, 64, dtype=torch.bfloat16, device=CUDA, seed=heads).requires_grad_()
            for heads in (8, 2, 2)
        ]
        out = ring_attention(*leaves, chunks, 64**-0.5, window, dist.group.WORLD)
        dout = random(8, 1000, 64, dtype=torch.bfloat16, device=CUDA, seed=9)
        out.backward(dout)
    finally:
        dist.destroy_process_group()
    right = [leaf.detach().double().requires_grad_() for leaf in leaves]
    keys, values = (tensor.repeat_interleave(4, 0) for tensor in right[1:])
    place = torch.arange(1000, device=CUDA)
    sequence = torch.repeat_interleave(torch.arange(3, device=CUDA), torch.tensor(lengths, device=CUDA))
    seen = (place[:, None] >= place) & (sequence[:, None] == sequence)
    if window is not None:
        seen &= place[:, None] - place < window
    expected = F.scaled_dot_product_attention(right[0], keys, values, seen)
    expected.backward(dout.double())
    for mine, theirs in [
        (out, expected),
        *((leaf.grad, other.grad) for leaf, other in zip(leaves, right, strict=True)),
    ]:
        assert float((mine.double() - theirs).detach().abs().max() / theirs.detach().abs().max()) <= 0.05


# Whole models and runs


@pytest.mark.parametrize("family", FAMILIES)
def test_slots(family: str) -> None:
    model = tiny(family, **FAMILIES[family][1]).to(CUDA)
    plain = numbers(model)
    filled = slots.install(model)
    assert counts(filled) == FAMILIES[family][0]
    close(numbers(model), plain, tolerance=5e-5)


@pytest.mark.timeout(900)
def test_fine_tuning_of_a_long_row(tmp_path: Path) -> None:
    """32,768 tokens in a row on one GPU, with everything that saves memory: as without our kernels."""
    lines = run_long(tmp_path, length=32768, accelerator="gpu")
    for ours, plain in zip(*lines, strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], rel=0.01)
        assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=0.05)
    assert lines[0][-1]["loss"] < lines[0][0]["loss"]


def run_long(folder: Path, *, length: int, accelerator: str) -> list[list[dict[str, Any]]]:
    """The numbers of every step of a run with our kernels, and of one without."""
    model = save_chat_model(folder / "model", max_position_embeddings=length)
    rows = save_rows(folder / "rows.jsonl", conversations(length // 8))
    found = []
    for kernels in ("true", "false"):
        output = folder / f"kernels-{kernels}"
        words = [
            *(sys.executable, "-m", "swift_dist.cli", "sft", "--model", str(model), "--dataset", str(rows)),
            *("--max_length", str(length), "--packing", "true", "--train.steps", "4", "--output", str(output)),
            *("--launcher", "torchrun", "--nproc_per_node", "1", "--cluster.accelerator", accelerator),
            *("--train.micro_batch_size", "1", "--train.global_batch_size", "1", "--train.precision", "bf16"),
            *("--train.recompute", "full", "--train.tiled_loss", "true", "--train.tiled_mlp", "true"),
            *("--optimizer.lr", "3e-3", "--model.liger", "false", "--model.kernels", kernels),
        ]
        done = subprocess.run(words, env=dict(os.environ), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        metrics = next(output.rglob("metrics.jsonl"))
        steps = [json.loads(line) for line in metrics.read_text().splitlines()]
        found.append([step for step in steps if "loss" in step])
    assert len(found[0]) == 4
    return found
