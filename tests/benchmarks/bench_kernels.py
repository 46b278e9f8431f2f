"""Every kernel beside eager torch, torch.compile, Liger-Kernel and transformer-engine: forward, backward, peak memory.

In bf16, with the sizes of an 8B model (width 4096, MLP 14336, vocabulary 128256, 32 and 8 heads of 128) on CUDA and
small ones on a CPU, where "ours" is the kernels' plain-torch form. The ways take turns within one run, and what is
printed are medians of their times as ratios to eager's in the same round: 0.50 is half the time. Memory is the peak
beyond the inputs, of forward and backward together, as a ratio to eager's (CUDA only). Where eager does not fit, ratios
are to the first way that does.

    python tests/benchmarks/bench_kernels.py [--device cuda] [--tokens 8192 32768 131072] [--kernels rms_norm ...]
        [--rounds 9] [--json FILE] [--check]

--check fails where ours takes longer than Liger's, or where our cross entropy takes more memory than theirs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from swift_dist.kernels import block_fp8, linear_cross_entropy, lse_merge, rms_norm, rope, swiglu, zigzag

WAYS = ("eager", "compile", "ours", "liger", "te")
EPS = 1e-5
Way = Callable[..., Any]


@dataclass(frozen=True)
class Sizes:
    width: int
    mlp: int
    vocabulary: int
    heads: int
    kv_heads: int
    head: int


LARGE, SMALL = Sizes(4096, 14336, 128256, 32, 8, 128), Sizes(256, 896, 4096, 8, 2, 32)


@dataclass(frozen=True)
class Case:
    """One kernel's inputs, and the ways to compute it of them (those that are installed).

    Args:
        inputs: with gradient where one flows.
    """

    inputs: tuple[torch.Tensor, ...]
    ways: dict[str, Way]


@dataclass
class Row:
    kernel: str
    tokens: int
    way: str
    forward: float | None = None
    backward: float | None = None
    total: float | None = None
    memory: float | None = None
    milliseconds: float | None = None
    mib: float | None = None
    problem: str | None = None


class Maker:
    """Makes cases."""

    def __init__(self, device: torch.device, sizes: Sizes) -> None:
        self.device, self.sizes = device, sizes
        self.liger = _module("liger_kernel.transformers.functional") if device.type == "cuda" else None
        self.te = _module("transformer_engine.pytorch") if device.type == "cuda" else None

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16, learns: bool = True) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=self.device).requires_grad_(learns)

    def rms_norm(self, tokens: int) -> Case:
        width = self.sizes.width
        ways: dict[str, Way] = {
            "eager": lambda x, w: rms_norm.reference(x, w, EPS),
            "ours": lambda x, w: rms_norm.rms_norm(x, w, EPS),
        }
        if self.liger:
            ways["liger"] = lambda x, w: self.liger.liger_rms_norm(x, w, EPS)
        if self.te:
            norm = self.te.RMSNorm(width, eps=EPS, params_dtype=torch.bfloat16, device=self.device)
            ways["te"] = lambda x, w: norm(x)  # with a weight of its own
        return Case((self.random(tokens, width), self.random(width)), ways)

    def swiglu(self, tokens: int) -> Case:
        ways: dict[str, Way] = {"eager": swiglu.reference, "ours": swiglu.swiglu}
        if self.liger:
            ways["liger"] = self.liger.liger_swiglu
        return Case((self.random(tokens, self.sizes.mlp), self.random(tokens, self.sizes.mlp)), ways)

    def rope(self, tokens: int) -> Case:
        sizes = self.sizes
        query, key = (
            # as they come out of a projection
            self.random(1, tokens, heads, sizes.head, learns=False).transpose(1, 2).requires_grad_()
            for heads in (sizes.heads, sizes.kv_heads)
        )
        angles = torch.rand(1, tokens, sizes.head // 2, device=self.device).repeat(1, 1, 2)
        cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        ways: dict[str, Way] = {
            "eager": lambda q, k: rope.reference(q, k, cos, sin),
            "ours": lambda q, k: rope.rope(q, k, cos, sin),
        }
        if self.liger:
            ways["liger"] = lambda q, k: self.liger.liger_rope(q, k, cos, sin)
        module = _module("transformer_engine.pytorch.attention.rope") if self.te else None
        if module:
            freqs = angles.transpose(0, 1)[:, :, None]  # [T, 1, 1, d]
            ways["te"] = lambda q, k: tuple(
                module.apply_rotary_pos_emb(x.permute(2, 0, 1, 3), freqs, tensor_format="sbhd", fused=True)
                for x in (q, k)
            )
        return Case((query, key), ways)

    def _of_vocabulary(self, tokens: int) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        labels = torch.randint(0, self.sizes.vocabulary, (tokens,), device=self.device)
        weight = self.random(self.sizes.vocabulary, self.sizes.width, learns=False) * self.sizes.width**-0.5
        return (self.random(tokens, self.sizes.width), weight.requires_grad_()), labels

    def linear_cross_entropy(self, tokens: int) -> Case:
        inputs, labels = self._of_vocabulary(tokens)
        ways: dict[str, Way] = {
            "eager": lambda h, w: F.cross_entropy(F.linear(h, w).float(), labels, reduction="sum"),
            "ours": lambda h, w: linear_cross_entropy.linear_cross_entropy(h, w, labels),
        }
        if self.liger:
            ways["liger"] = lambda h, w: self.liger.liger_fused_linear_cross_entropy(h, w, labels, reduction="sum")
        module = _module("transformer_engine.pytorch.cross_entropy") if self.te else None
        if module:  # of logits, [1, T, V]
            ways["te"] = lambda h, w: module.parallel_cross_entropy(
                F.linear(h, w)[None], labels[None], 0.0, False
            ).sum()
        return Case(inputs, ways)

    def linear_logps(self, tokens: int) -> Case:
        inputs, labels = self._of_vocabulary(tokens)
        ways: dict[str, Way] = {
            "eager": lambda h, w: linear_cross_entropy.reference(h, w, labels)[0],
            "ours": lambda h, w: linear_cross_entropy.linear_logps(h, w, labels)[0],
        }
        return Case(inputs, ways)

    def lse_merge(self, tokens: int) -> Case:
        outs = [self.random(self.sizes.heads, tokens, self.sizes.head) for _ in range(2)]
        lses = [self.random(self.sizes.heads, tokens, dtype=torch.float32) for _ in range(2)]
        ways: dict[str, Way] = {"eager": lse_merge.reference, "ours": lse_merge.lse_merge}
        return Case((outs[0], lses[0], outs[1], lses[1]), ways)

    def zigzag(self, tokens: int) -> Case:
        lengths, index = [tokens], zigzag.positions([tokens], 4, 1).to(self.device)
        ways: dict[str, Way] = {
            "eager": lambda row: row[index],
            "ours": lambda row: zigzag.shard(row, lengths, 4, 1),
        }
        return Case((self.random(tokens, self.sizes.width),), ways)

    def quantise(self, tokens: int) -> Case:
        ways: dict[str, Way] = {"eager": block_fp8.quantise_reference, "ours": block_fp8.quantise}
        return Case((self.random(self.sizes.mlp, self.sizes.width, learns=False),), ways)

    def dequantise(self, tokens: int) -> Case:
        held = block_fp8.quantise_reference(self.random(self.sizes.mlp, self.sizes.width, learns=False))
        ways: dict[str, Way] = {
            "eager": lambda q, f: block_fp8.dequantise_reference(q, f, dtype=torch.bfloat16),
            "ours": lambda q, f: block_fp8.dequantise(q, f, dtype=torch.bfloat16),
        }
        return Case(held, ways)


KERNELS = (
    *("rms_norm", "swiglu", "rope", "linear_cross_entropy", "linear_logps", "lse_merge", "zigzag"),
    *("quantise", "dequantise"),  # of a weight: once, whatever the number of tokens
)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception:  # transformer-engine fails in many ways where its libraries are not those of torch
        return None


class Clock:
    """Seconds since it was made, of work on a device."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        if self._on_cuda:
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        self._begin = time.perf_counter()

    def seconds(self) -> float:
        if not self._on_cuda:
            return time.perf_counter() - self._begin
        self._events[1].record()
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000


def once(case: Case, way: Way, device: torch.device) -> tuple[float, float, float]:
    """(seconds forwards, seconds backwards, bytes)."""
    before = 0
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(device)
    results = way(*case.inputs)
    forward, backward = clock.seconds(), 0.0
    results = [result for result in (results if isinstance(results, tuple) else (results,)) if result.requires_grad]
    if results:
        gradients = [torch.ones_like(result) for result in results]
        learning = [tensor for tensor in case.inputs if tensor.requires_grad]
        clock = Clock(device)
        torch.autograd.grad(results, learning, gradients, allow_unused=True)
        backward = clock.seconds()
    return forward, backward, float(torch.cuda.max_memory_allocated() - before) if device.type == "cuda" else 0.0


def measure(kernel: str, tokens: int, case: Case, rounds: int, device: torch.device) -> Iterator[Row]:
    """A row for each way; ways take turns."""
    ways, problems = dict(case.ways), {}
    ways["compile"] = torch.compile(ways["eager"], dynamic=False)
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS if way in ways}
    for number in range(rounds + 2):  # two to warm up
        for way in [way for way in found if way not in problems]:
            try:
                numbers = once(case, ways[way], device)
            except torch.OutOfMemoryError:
                problems[way] = "out of memory"
                torch.cuda.empty_cache()
            except Exception as error:
                problems[way] = f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
            else:
                found[way] += [numbers] if number >= 2 else []
    base = next((way for way in found if way not in problems), None)
    for way, numbers in found.items():
        if way in problems or base is None:
            yield Row(kernel, tokens, way, problem=problems.get(way))
            continue
        pairs = list(zip(numbers, found[base], strict=True))
        yield Row(
            kernel,
            tokens,
            way,
            forward=statistics.median(one[0] / other[0] for one, other in pairs),
            backward=statistics.median(one[1] / other[1] for one, other in pairs) if pairs[0][1][1] else None,
            total=statistics.median(sum(one[:2]) / sum(other[:2]) for one, other in pairs),
            memory=numbers[-1][2] / found[base][-1][2] if found[base][-1][2] else None,
            milliseconds=1000 * statistics.median(sum(one[:2]) for one in numbers),
            mib=numbers[-1][2] / 2**20 if numbers[-1][2] else None,
        )


HEAD = (
    "| kernel | tokens | way | forward | backward | both | memory | both, ms | MiB |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def lines(rows: list[Row]) -> Iterator[str]:
    """Of the table, without its head."""
    for row in rows:
        if row.problem is not None:
            yield f"| {row.kernel} | {row.tokens} | {row.way} | {row.problem} | | | | | |"
            continue
        ratios = [
            f"{value:.2f}" if value is not None else "" for value in (row.forward, row.backward, row.total, row.memory)
        ]
        sizes = [f"{row.milliseconds:.3f}", f"{row.mib:.0f}" if row.mib is not None else ""]
        yield f"| {' | '.join([row.kernel, str(row.tokens), row.way, *ratios, *sizes])} |"


def complaints(rows: list[Row]) -> list[str]:
    """Where ours is worse than Liger's."""
    found = []
    by_way = {(row.kernel, row.tokens, row.way): row for row in rows}
    for (kernel, tokens, way), liger in by_way.items():
        if way != "liger" or liger.problem is not None:
            continue
        ours, what = by_way[kernel, tokens, "ours"], f"{kernel} of {tokens} tokens"
        if ours.problem is not None:
            found.append(f"{what}: ours: {ours.problem}")
            continue
        assert ours.total and liger.total
        if ours.total > liger.total:
            found.append(f"{what}: {liger.total / ours.total:.2f} x Liger's speed")
        if kernel == "linear_cross_entropy" and (ours.mib or 0) > (liger.mib or 0):
            found.append(f"{what}: {ours.mib:.0f} MiB, Liger {liger.mib:.0f}")
    return found


def main() -> None:
    has_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if has_cuda else "cpu")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    on_cuda = device.type == "cuda"
    maker = Maker(device, LARGE if on_cuda else SMALL)
    if args.check and maker.liger is None:
        raise SystemExit("--check compares with Liger-Kernel on a GPU, and it does not import")
    torch.manual_seed(0)
    rows: list[Row] = []
    name = torch.cuda.get_device_name() if on_cuda else "CPU"
    print(f"{name}, torch {torch.__version__}, bf16; ratios to eager\n\n{HEAD}", flush=True)
    for kernel in args.kernels:
        lengths = args.tokens or ([8192, 32768, 131072] if on_cuda else [512])
        for tokens in lengths[:1] if kernel in ("quantise", "dequantise") else lengths:
            torch.compiler.reset()
            case = getattr(maker, kernel)(tokens)
            found = list(measure(kernel, tokens, case, args.rounds or (9 if on_cuda else 3), device))
            rows += found
            print("\n".join(lines(found)), flush=True)  # at once: whoever runs out of time has the rest
            if args.json:
                args.json.write_text(
                    json.dumps({"device": name, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
                )
            del case
            if on_cuda:
                torch.cuda.empty_cache()
    if args.check and (worse := complaints(rows)):
        raise SystemExit("\n".join(["", "worse than Liger-Kernel:", *worse]))


if __name__ == "__main__":
    main()
