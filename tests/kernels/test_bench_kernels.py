"""The benchmark of kernels: all ways compute the same, and its check finds what is worse than Liger's."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks import bench_kernels as bench
from tests.benchmarks.bench_kernels import KERNELS, SMALL, Maker, Row


@pytest.mark.parametrize("kernel", KERNELS)
def test_ways_compute_the_same(kernel: str) -> None:
    """What is timed against one another: results, and the gradient of every input."""
    torch.manual_seed(0)
    case = getattr(Maker(torch.device("cpu"), SMALL), kernel)(24)
    assert set(case.ways) == {"eager", "ours"}
    found = {}
    for name, way in case.ways.items():
        results = way(*case.inputs)
        results = [tensor.float() for tensor in (results if isinstance(results, tuple) else (results,))]
        learning = [tensor for tensor in case.inputs if tensor.requires_grad]
        assert bool(learning) == results[0].requires_grad
        gradients = torch.autograd.grad(sum(tensor.sum() for tensor in results), learning) if learning else ()
        found[name] = [*results, *gradients]
    for ours, eager in zip(found["ours"], found["eager"], strict=True):
        scale = eager.detach().abs().max().clamp(min=1e-6)
        torch.testing.assert_close(ours / scale, eager / scale, rtol=0, atol=0.02)


@pytest.mark.usefixtures("uncompiled")
def test_a_row_for_each_way() -> None:
    def broken(row: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("1 GiB")

    case = bench.Maker(torch.device("cpu"), SMALL).zigzag(24)
    rows = list(
        bench.measure("zigzag", 24, bench.Case(case.inputs, {**case.ways, "te": broken}), 2, torch.device("cpu"))
    )
    assert [(row.way, row.problem) for row in rows] == [
        *((way, None) for way in ("eager", "compile", "ours")),
        ("te", "out of memory"),
    ]
    assert rows[0].forward == rows[0].total == 1.0 and rows[2].milliseconds
    assert all(line.count("|") == 10 for line in (*bench.HEAD.splitlines(), *bench.lines(rows)))


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def test_the_check() -> None:
    def rows(ours: float, mib: float, kernel: str = "linear_cross_entropy") -> list[Row]:
        return [
            Row(kernel, 8192, "ours", total=ours, mib=mib),
            Row(kernel, 8192, "liger", total=0.5, mib=100.0),
        ]

    assert bench.complaints(rows(0.5, 100.0)) == []
    assert bench.complaints(rows(0.6, 100.0)) == ["linear_cross_entropy of 8192 tokens: 0.83 x Liger's speed"]
    assert bench.complaints(rows(0.4, 101.0)) == ["linear_cross_entropy of 8192 tokens: 101 MiB, Liger 100"]
    assert bench.complaints(rows(0.4, 101.0, "rope")) == []
    failed = [Row("rope", 8192, "ours", problem="out of memory"), rows(1.0, 1.0, "rope")[1]]
    assert bench.complaints(failed) == ["rope of 8192 tokens: ours: out of memory"]
    assert any("out of memory" in line for line in bench.lines(failed))
