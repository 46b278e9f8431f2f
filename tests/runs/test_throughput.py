"""Rates and device peaks."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from swift_dist.runs.throughput import Throughput, memory_gib, peak_tflops, resident_peak


@pytest.mark.parametrize(
    "name, precision, peak",
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "fp8", 1979.0),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
        ("NVIDIA L40S", "bf16", 362.0),
        ("NVIDIA L40", "bf16", 181.0),
        ("NVIDIA L4", "bf16", 121.0),
        ("Tesla V100-SXM2-16GB", "fp16", 125.0),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("NVIDIA T400", "fp16", None),
        ("NVIDIA RTX A1000", "bf16", None),
        ("NVIDIA B200", "bf16", 2250.0),
    ],
)
def test_peaks_by_device_name(name, precision, peak):
    assert peak_tflops(name, precision) == peak


def test_rates_are_per_device_and_mfu_only_with_a_peak():
    # 1e6 tokens/s x 6e9 FLOP/token = 6000 TFLOP/s over 8 devices = 750 each
    rates = Throughput(6e9, 8, peak=1000.0).rates(tokens=2_000_000, seconds=2.0)
    assert rates == {"tokens_per_second": 1e6, "tflops_per_device": 750.0, "mfu": 0.75}
    assert "mfu" not in Throughput(6e9, 8).rates(2_000_000, 2.0)
    assert Throughput.of("cpu", flops_per_token=6e9, num_devices=1, precision="fp32").peak is None


def test_memory_on_the_cpu_is_the_resident_peak():
    block = bytearray(b"x" * (200 * 2**20))
    resident = psutil.Process().memory_info().rss / 2**30
    del block
    assert resident - 0.001 <= memory_gib("cpu") < psutil.virtual_memory().total / 2**30


def test_memory_of_a_process_is_not_that_of_the_one_that_started_it():
    """What getrusage says of a child began with its parent's size."""
    block = b"x" * (300 * 2**20)
    code = "from swift_dist.runs.throughput import memory_gib; print(memory_gib('cpu'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.005 < float(done.stdout) < 0.2 and len(block)
    assert resident_peak(2**22 + 1) == 0  # no process has this number


@pytest.mark.gpu
def test_memory_and_peak_on_a_gpu():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch.cuda.reset_peak_memory_stats()
    before = memory_gib("cuda:0")
    block = torch.zeros(2**30, dtype=torch.uint8, device="cuda:0")
    assert memory_gib("cuda:0") == pytest.approx(before + 1.0, abs=0.01) and block.numel()
