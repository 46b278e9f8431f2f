"""What this node's GPUs say through NVIDIA's management library, and which of them its processes may use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def load_nvml() -> Any | None:
    """The module of nvidia-ml-py with the library initialised; None where either is missing."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def device_files() -> int:
    """GPUs that the driver has made device files for."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def visible_devices() -> str | None:
    """CUDA_VISIBLE_DEVICES as the node's ranks would find it; None: not set.

    Ray empties the variable for an actor that asked for no GPU; its raylet, our parent, still has it.
    """
    if "RAY_RAYLET_PID" in os.environ or "RAY_JOB_ID" in os.environ:
        try:
            entries = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
        except OSError:
            return None
        found = [entry.decode() for entry in entries if entry.startswith(b"CUDA_VISIBLE_DEVICES=")]
        return found[0].partition("=")[2] if found else None
    return os.environ.get("CUDA_VISIBLE_DEVICES")
