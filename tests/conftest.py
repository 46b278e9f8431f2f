"""How the suite is shared out over processes (`pytest -n`, see the Makefile), and what its commands inherit."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS / "support"))  # importlib import mode has no package for tests
import interpreted_kernels  # noqa: E402, F401

LONG = (
    *("serving/test_openai.py", "serving/test_deploy.py", "serving/test_deploy_hf.py", "serving/test_source.py"),
    *("serving/test_deploy_vllm.py", "serving/test_infer_vllm.py", "serving/test_infer_ray.py"),
    *("serving/test_infer.py", "serving/hf/test_server.py", "serving/hf/test_generator.py"),
    *("checkpoint/test_resume.py", "system/test_kill.py", "engines/test_state.py", "system/test_failing_runs.py"),
    *("test_docs.py", "engines/test_engine.py", "cluster/test_gang.py", "system/test_torchrun.py"),
    *("golden/test_parity.py", "cluster/test_driver.py", "data/test_prepare_resume.py", "doctor/test_cluster.py"),
    *("parallel/test_megatron_verdict.py", "golden/test_router_losses.py", "converters/test_engine_round_trip.py"),
)
"""Files that take longest: they begin, so that no process is left with one of them at the end."""

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job: its children would not hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        file = item.path.relative_to(TESTS).as_posix()
        return LONG.index(file) if file in LONG else len(LONG)

    items.sort(key=place)
