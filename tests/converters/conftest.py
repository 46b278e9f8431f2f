from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"converters_tests_{name}", Path(__file__).parent / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tiny_models = _load("tiny_models")


@pytest.fixture(scope="session", params=sorted(tiny_models.CONFIGS))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A saved tiny model of each family: .name, .folder, .hf (config.json), .family, .rows, .tensors (by HF name)."""
    from types import SimpleNamespace

    from safetensors.torch import load_file

    from swift_dist.models import find_family

    folder = tmp_path_factory.mktemp(request.param)
    tiny_models.save_tiny_model(request.param, folder)
    hf = json.loads((folder / "config.json").read_text())
    family = find_family(hf)
    tensors = load_file(folder / "model.safetensors")
    return SimpleNamespace(
        name=request.param, folder=folder, hf=hf, family=family, rows=family.rows(hf), tensors=tensors
    )


@pytest.fixture
def whole(saved: Any) -> dict[str, torch.Tensor]:
    """The model's weights as whole Megatron tensors, by global name."""
    from swift_dist.converters.mapping import expand, slices

    found = {}
    for tensor in expand(saved.rows):
        values = torch.full(tensor.shape, float("nan"))
        for piece in tensor.pieces:
            values[slices(piece.megatron_box)] = saved.tensors[piece.hf][slices(piece.hf_box)]
        found[tensor.name] = values
    return found
