"""Hugging Face folder -> live engine on several ranks -> torch_dist checkpoint -> Hugging Face folder: bit-exact.

The names and shapes that the rows speak of are thereby those of the real model, not of our idea of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from swift_dist.convert.megatron_to_hf import MegatronToHFOptions, run

RANKS = Path(__file__).with_name("engine_ranks.py")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_biased-TP2": ("llama_biased", {"tensor_model_parallel_size": 2}),
    "mistral-TP2-SP": ("mistral", {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "qwen2-tied-PP2": ("qwen2", {"pipeline_model_parallel_size": 2}),
    "qwen2-tied-PP2xVPP2": (
        "qwen2",
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    ),
    "qwen3-TP2-one-group": ("qwen3", {"tensor_model_parallel_size": 2}),
    "qwen3_moe-EP2": ("qwen3_moe", {"expert_model_parallel_size": 2}),
    "qwen3_moe-TP2-ETP2": ("qwen3_moe", {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """(original folder, exported folder) of each case; all cases run on the same two processes."""
    import converters_tests_tiny_models as tiny

    base = tmp_path_factory.mktemp("round_trip")
    cases, folders = [], {}
    for name, (model, parallel) in CASES.items():
        source, run_dir = base / name / "hf", base / name / "run"
        run_dir.mkdir(parents=True)
        tiny.save_tiny_model(model, source, num_hidden_layers=4)
        hf_config = json.loads((source / "config.json").read_text())
        job = {
            "model": {"path": str(source)},
            "data": {"sequence_length": 16},
            "train": {"steps": 1, "precision": "fp32", "global_batch_size": 4},
            "parallel": parallel,
        }
        cases.append({"run_dir": str(run_dir), "folder": str(source), "hf_config": hf_config, "job": job})
        folders[name] = (source, base / name / "back")
    _run_ranks(cases, base, world_size=2)
    for source, target in folders.values():
        run(MegatronToHFOptions(source=str(source.with_name("run")), target=str(target)))
    return folders


def _run_ranks(cases: list[dict[str, Any]], base: Path, world_size: int) -> None:
    (base / "cases.json").write_text(json.dumps(cases))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = []
    try:
        for rank in range(world_size):
            command = [sys.executable, "-W", "ignore", str(RANKS), str(rank), str(world_size), str(base / "cases.json")]
            with (base / f"rank_{rank}.log").open("wb") as log:
                ranks.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
        codes = [rank.wait(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    logs = "\n".join(path.read_text()[-3000:] for path in sorted(base.glob("rank_*.log")))
    assert codes == [0] * world_size, logs


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_round_trip_through_the_engine_is_bit_exact(converted: dict[str, tuple[Path, Path]], name: str) -> None:
    from safetensors.torch import load_file

    source, target = converted[name]
    before, after = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    assert before.keys() == after.keys()
    for key, values in before.items():
        assert torch.equal(values, after[key]), key
