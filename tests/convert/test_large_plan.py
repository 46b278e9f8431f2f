"""A plan of the largest open model from headers alone: nothing of its size is ever read, held or written."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.convert import large_model

COMMAND = [sys.executable, "-c", "from swift_dist.cli import main; raise SystemExit(main())", "convert"]
PARAMETERS = 671_026_419_200 + 11_610_068_224  # DeepSeek-V3's, and those of its layer for prediction that are its own


@pytest.mark.slow
def test_deepseek_v3_is_planned_from_metadata(tmp_path: Path) -> None:
    num_bytes = large_model.write_large_model(tmp_path / "v3")
    assert num_bytes > 680e9 and len(list((tmp_path / "v3").glob("*.safetensors"))) > 150
    words = ["hf-to-megatron", str(tmp_path / "v3"), str(tmp_path / "out"), "--dry-run", "--json", "--workers", "64"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    plan = json.loads(done.stdout)
    assert plan["family"] == "deepseek_v3" and plan["parameters"] == PARAMETERS
    assert plan["bytes"] == 2 * PARAMETERS + 2 * 59 * 256  # bf16; the routers' biases stay fp32
    assert num_bytes * 0.98 < plan["bytes_read"] < num_bytes
    assert 60 < plan["estimated_seconds"] < 1e5 and plan["estimated_memory"] < 8e9
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert max(peak, before) < 4_000_000, "kilobytes: a plan, not a model"
