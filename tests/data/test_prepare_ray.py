"""Runs `ray_cases.py` in a process of its own: Ray keeps the settings of a process's earlier clusters for its life.

Nor may it inherit them: the tests of the gang set variables for a cluster of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_ray_cases() -> None:
    cases = Path(__file__).with_name("ray_cases.py")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(words, capture_output=True, text=True, timeout=250, cwd=cases.parents[2], env=clean)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "3 passed" in done.stdout
