"""An independent witness: mbridge makes the same Megatron tensors of the same folders, bit for bit.

It has no Mistral, no Llama with biases on all projections, no DeepSeek-V2, and no dense layers in Qwen3-MoE.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import family_table as table
import pytest
import torch
from dist_tensors import dist_tensors

from swift_dist.converters.mapping import checkpoint_key, expand
from swift_dist.models import find_family

DENSE = ("llama", "qwen2", "qwen3")
EXPERTS = ("qwen3_moe", "mixtral", "deepseek_v3")
CHANGES: dict[str, dict[str, Any]] = {"qwen3_moe": {"mlp_only_layers": []}}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("mbridge") is None, reason="mbridge is not installed: it comes with the extra `dev`"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each model: NAME/hf, NAME/checkpoint (ours) and NAME/theirs.safetensors."""
    base = tmp_path_factory.mktemp("witness")
    models = {}
    for name in (*DENSE, *EXPERTS):
        hf = base / name / "hf"
        table.write_model(name, hf, **CHANGES.get(name, {}))
        table.to_megatron(hf, base / name / "checkpoint")
        names = None if name in DENSE else global_names(hf)
        models[name] = {"folder": str(hf), "target": str(base / name / "theirs.safetensors"), "names": names}
    (base / "request.json").write_text(json.dumps({"models": models}))
    program = table.TESTS / "support" / "mbridge_tensors.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(program), str(base / "request.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return base


def global_names(hf: Path) -> list[str]:
    from safetensors.torch import load_file

    config = json.loads((hf / "config.json").read_text())
    family = find_family(config)
    config = family.for_folder(config, load_file(hf / "model.safetensors").keys())
    return [tensor.name for tensor in expand(family.rows(config))]


@pytest.mark.parametrize("name", [*DENSE, *EXPERTS])
def test_the_same_tensors_as_mbridge_makes(base: Path, name: str) -> None:
    from safetensors.torch import load_file

    ours = dist_tensors(base / name / "checkpoint")
    theirs = load_file(base / name / "theirs.safetensors")
    compared = dict.fromkeys(ours, 0)
    for found, values in theirs.items():
        key, expert = checkpoint_key(found)
        mine = ours[key] if expert is None else ours[key][expert]
        assert (mine.dtype, mine.shape) == (values.dtype, values.shape) and mine.dtype == torch.float32, found
        assert torch.equal(mine.view(torch.int32), values.view(torch.int32)), found
        compared[key] += values.numel()
    assert compared == {key: values.numel() for key, values in ours.items()}
