"""GPUs' health from a stand-in for nvidia-ml-py with recorded values: there is no GPU where these tests run."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from looking import look_here

from swift_dist.doctor.checks import gpu_health


class NVMLError(Exception):
    pass


class StandIn(SimpleNamespace):
    """The calls that the check makes, in nvidia-ml-py's names and shapes, over a list of GPUs as plain values."""

    NVMLError = NVMLError
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC, NVML_TEMPERATURE_GPU = 1, 0, 0

    def __init__(self, gpus: list[dict[str, Any] | None]) -> None:
        super().__init__(gpus=gpus)

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        gpu = self.gpus[index]
        if gpu is None:
            raise NVMLError("GPU is lost")
        return gpu

    def nvmlDeviceGetPciInfo(self, gpu: dict[str, Any]) -> Any:
        return SimpleNamespace(busId=gpu.get("bus", "00000000:3B:00.0"))

    def nvmlDeviceGetEccMode(self, gpu: dict[str, Any]) -> tuple[int, int]:
        return 1, 1

    def nvmlDeviceGetTotalEccErrors(self, gpu: dict[str, Any], kind: int, counter: int) -> int:
        if "uncorrected" not in gpu:
            raise NVMLError("Not Supported")
        return gpu["uncorrected"]

    def nvmlDeviceGetRemappedRows(self, gpu: dict[str, Any]) -> tuple[int, int, int, int]:
        return gpu.get("remapped", (0, 0, 0, 0))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: dict[str, Any]) -> int:
        return gpu.get("reasons", 0)

    def nvmlDeviceGetTemperature(self, gpu: dict[str, Any], sensor: int) -> int:
        return gpu.get("celsius", 34)


@pytest.fixture
def health(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def look(*gpus: dict[str, Any] | None, xids: dict[str, list[int]] | None = None) -> list[Any]:
        monkeypatch.setitem(sys.modules, "pynvml", StandIn(list(gpus)))
        monkeypatch.setattr(gpu_health, "device_files", lambda: len(gpus))
        monkeypatch.setattr(gpu_health, "_xids", lambda: xids or {})
        return look_here(tmp_path, "gpu_health").findings

    return look


def test_healthy_gpus(health: Any) -> None:
    idle_at_low_clocks = {"uncorrected": 0, "reasons": 0x1}
    (found,) = health(idle_at_low_clocks, {"reasons": 0x4})  # a power cap is how servers are run
    assert found.level == "ok" and found.found.startswith("2 GPUs: no memory error")


@pytest.mark.parametrize(
    ("gpu", "level", "words"),
    [
        ({"uncorrected": 3}, "bad", "GPU 0: 3 uncorrected memory errors"),
        ({"remapped": (1, 1, 0, 1)}, "bad", "GPU 0: a memory row could not be remapped"),
        ({"remapped": (1, 0, 1, 0)}, "warn", "GPU 0: a memory row waits to be remapped"),
        ({"reasons": 0x48, "celsius": 91}, "warn", "slowed down: hardware slowdown, hardware thermal slowdown (91 °C)"),
        (None, "bad", "GPU 0 does not answer: GPU is lost"),
    ],
)
def test_a_sick_gpu(health: Any, gpu: dict[str, Any] | None, level: str, words: str) -> None:
    (found,) = health(gpu, {"uncorrected": 0})
    assert found.level == level and words in found.found and found.advice


def test_xids_of_the_kernels_log(health: Any) -> None:
    lines = [
        "4,1201,73845123,-;NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.",
        "4,1202,73845124,-;NVRM: Xid (PCI:0000:86:00): 31, pid=4711, name=python, Ch 00000008, MMU Fault",
        "6,1203,73845125,-;nvidia-nvlink: Nvlink Core is being initialized",
    ]
    xids = gpu_health.parse_xids(lines)
    assert xids == {"0000:3b:00": [79], "0000:86:00": [31]}
    (found,) = health({"uncorrected": 0}, {"uncorrected": 0}, xids=xids)  # 31 is a program's own fault
    assert found.level == "bad" and "GPU at 0000:3b:00: Xid 79 (the GPU has fallen off the bus)" in found.found
    assert "drain this node" in found.advice


def test_gpus_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    monkeypatch.setattr(gpu_health, "device_files", lambda: 2)
    monkeypatch.setattr(gpu_health, "_xids", lambda: None)
    health, log = sorted(look_here(tmp_path, "gpu_health").findings, key=lambda f: f.found)
    assert (health.level == "warn" and "swift-dist[gpu]" in health.advice) or "swift-dist[gpu]" in log.advice
    assert {health.level, log.level} == {"warn"} and "dmesg" in health.advice + log.advice
