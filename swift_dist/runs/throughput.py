"""How fast a step was: tokens/s, TFLOP/s per device, model FLOP utilisation (MFU), and how much memory it took."""

from __future__ import annotations

import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Precision = Literal["fp32", "bf16", "fp16", "fp8"]

PEAK_TFLOPS: tuple[tuple[str, dict[Precision, float]], ...] = (
    # Dense tensor-core rates (without structured sparsity), TFLOP/s, from NVIDIA's data sheets of each product;
    # fp32 is the plain (not TF32) rate, which is what fp32 training uses. The first name found in the device's name
    # counts, so longer names come first. A device or precision that is not here has no MFU rather than a guessed one.
    ("GB200", {"bf16": 2500.0, "fp16": 2500.0, "fp8": 5000.0, "fp32": 80.0}),
    ("B200", {"bf16": 2250.0, "fp16": 2250.0, "fp8": 4500.0, "fp32": 75.0}),
    ("H200 NVL", {"bf16": 835.5, "fp16": 835.5, "fp8": 1670.5, "fp32": 60.0}),
    ("H200", {"bf16": 989.5, "fp16": 989.5, "fp8": 1979.0, "fp32": 67.0}),
    ("H100 NVL", {"bf16": 835.5, "fp16": 835.5, "fp8": 1670.5, "fp32": 60.0}),
    ("H100 PCIe", {"bf16": 756.5, "fp16": 756.5, "fp8": 1513.0, "fp32": 51.0}),
    ("H100", {"bf16": 989.5, "fp16": 989.5, "fp8": 1979.0, "fp32": 67.0}),
    ("H800", {"bf16": 989.5, "fp16": 989.5, "fp8": 1979.0, "fp32": 67.0}),
    ("H20", {"bf16": 148.0, "fp16": 148.0, "fp8": 296.0, "fp32": 44.0}),
    ("A100", {"bf16": 312.0, "fp16": 312.0, "fp32": 19.5}),
    ("A800", {"bf16": 312.0, "fp16": 312.0, "fp32": 19.5}),
    ("A30", {"bf16": 165.0, "fp16": 165.0, "fp32": 10.3}),
    ("L40S", {"bf16": 362.0, "fp16": 362.0, "fp8": 733.0, "fp32": 91.6}),
    ("L40", {"bf16": 181.0, "fp16": 181.0, "fp8": 362.0, "fp32": 90.5}),
    ("L4", {"bf16": 121.0, "fp16": 121.0, "fp8": 242.5, "fp32": 30.3}),
    ("V100-SXM", {"fp16": 125.0, "fp32": 15.7}),
    ("V100-PCIE", {"fp16": 112.0, "fp32": 14.0}),
    ("T4", {"fp16": 65.0, "fp32": 8.1}),
)


def peak_tflops(device_name: str, precision: Precision) -> float | None:
    """The peak rate of a device such as ``NVIDIA H100 80GB HBM3``, in TFLOP/s; None where it is not known."""
    words = device_name.replace("-", " ").split()
    for name, rates in PEAK_TFLOPS:
        # Whole words: "L4" must not be found in "L40", nor "T4" in "RTX T400".
        parts = name.replace("-", " ").split()
        if any(_matches(words[i : i + len(parts)], parts) for i in range(len(words))):
            return rates.get(precision)
    return None


def _matches(words: list[str], parts: list[str]) -> bool:
    """Equal, except that the last word may go on: V100-SXM stands for V100-SXM2 as well."""
    if len(words) < len(parts) or words[:-1] != parts[:-1]:
        return False
    return words[-1] == parts[-1] or (len(parts) > 1 and words[-1].startswith(parts[-1]))


@dataclass(frozen=True)
class Throughput:
    """What turns a step's tokens and seconds into rates.

    Attributes:
        flops_per_token: model FLOPs of forward and backward for one token (`ModelShape.flops_per_token`);
            recomputed activations do not count, as MFU is defined (PaLM, arXiv 2204.02311, appendix B).
        num_devices: ranks of the run.
        peak: TFLOP/s that one device could do, None where unknown.
    """

    flops_per_token: float
    num_devices: int
    peak: float | None = None

    def rates(self, tokens: int, seconds: float) -> dict[str, float]:
        """``tokens_per_second`` of the whole run, ``tflops_per_device`` and, where the peak is known, ``mfu``."""
        tokens_per_second = tokens / seconds
        tflops = tokens_per_second * self.flops_per_token / self.num_devices / 1e12
        rates = {"tokens_per_second": round(tokens_per_second, 2), "tflops_per_device": round(tflops, 5)}
        if self.peak is not None:
            rates["mfu"] = round(tflops / self.peak, 5)
        return rates

    @classmethod
    def of(cls, device: str, *, flops_per_token: float, num_devices: int, precision: Precision) -> Throughput:
        """With the peak of `device` (``cpu`` or ``cuda:<n>``) at `precision`."""
        if not device.startswith("cuda"):
            return cls(flops_per_token, num_devices)
        import torch

        return cls(flops_per_token, num_devices, peak_tflops(torch.cuda.get_device_name(device), precision))


def memory_gib(device: str) -> float:
    """The largest memory use so far, GiB: allocated by torch on a GPU, resident size of the process on the CPU."""
    if device.startswith("cuda"):
        import torch

        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return round(resident_peak() / 2**30, 3)


def resident_peak(process: int | Literal["self"] = "self") -> int:
    """Bytes of memory that a process of this machine held at most at one time; 0 of one that has ended.

    Not getrusage's ru_maxrss, in which Linux counts what the process was before it became this program: a child of a
    driver that holds 600 MB reads 600 MB there.
    """
    if sys.platform == "darwin":
        assert process == "self", "macOS says it of this process alone"
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0  # a zombie's has no such line
