"""Every kernel compiles for GPUs: Triton brings the compiler, so no GPU is needed. Whether it runs is for `-m gpu`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from swift_dist.kernels._triton import HAVE_TRITON

FILE = Path(__file__).with_name("compile_for_gpus.py")


@pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed (it has no wheels for this platform)")
@pytest.mark.parametrize(
    "words", [["90", "bf16"], pytest.param(["80", "90", "100", "bf16", "fp16", "fp32"], marks=pytest.mark.table)]
)
def test_for_gpus(words, tmp_path):
    """In a process of its own: here kernels belong to the interpreter. (80: A100, 90: H100 and H200, 100: B200.)"""
    root = Path(__file__).parents[2]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(FILE), *words],
        cwd=root, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    capabilities = [f"sm_{word}" for word in words if word.isdigit()]
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == capabilities
