"""What serving runs with: looked at here, and judged for nodes that lack it."""

from __future__ import annotations

from pathlib import Path

import pytest

from swift_dist.doctor.checks import serving
from swift_dist.doctor.values import Exam, Finding, Here, Node

EXAM = Exam(token="t", folder="/share")
GOOD = {
    "engines": {"vllm": None, "hf": None},
    "haproxy": {"version": "2.8.25"},
    "vllm": "0.29.0",
    "odd": [],
}


def test_here_it_runs_with_what_is_installed():
    (found,) = serving.judge({"n1": serving.observe(Here(EXAM, Node("n1"), {}))}, EXAM)
    assert found.level == "ok", found
    assert "hf" in found.found and "HAProxy 2." in found.found


def test_a_haproxy_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    broken = tmp_path / "haproxy"
    broken.write_text("#!/bin/sh\necho 'libcrypt.so.2: cannot open' >&2\nexit 127\n")
    broken.chmod(0o755)
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", str(broken))
    (found,) = serving.judge({"n1": serving.observe(Here(EXAM, Node("n1"), {}))}, EXAM)
    assert found.level == "warn" and "libcrypt.so.2: cannot open" in found.found and found.nodes == ("n1",)
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", str(tmp_path / "absent"))
    (found,) = serving.judge({"n1": serving.observe(Here(EXAM, Node("n1"), {}))}, EXAM)
    assert found.level == "warn" and "absent" in found.found


def test_packages_for_cuda_beside_torch_for_cpus(monkeypatch: pytest.MonkeyPatch):
    versions = {"torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchaudio": "2.11.0+cpu"}
    monkeypatch.setattr(serving, "_version", versions.get)
    assert serving.observe(Here(EXAM, Node("n1"), {}))["odd"] == ["torchvision"]
    versions["torch"] = "2.13.0+cu130"
    assert serving.observe(Here(EXAM, Node("n1"), {}))["odd"] == []
    facts = {"n1": GOOD, "n2": {**GOOD, "odd": ["torchvision"]}}
    assert serving.judge(facts, EXAM) == [
        Finding(
            "serving",
            "n2",
            "warn",
            "torchvision of a CUDA build beside torch's CPU build: vLLM cannot be imported",
            "pip uninstall torchvision",
            ("n2",),
        )
    ]


def test_engines_that_only_some_nodes_can_run_are_counted():
    other = {**GOOD, "engines": {**GOOD["engines"], "vllm": "vLLM is not installed"}, "vllm": None}
    (found,) = serving.judge({"n1": GOOD, "n2": other}, EXAM)
    assert found.found == "engines: vllm 0.29.0 on 1 of 2 nodes, hf; HAProxy 2.8.25"
