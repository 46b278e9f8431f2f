from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
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


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A saved tiny model by name: .name, .folder, .hf (config.json, as it fits the folder), .family, .rows, .tensors
    (by HF name). Saved once."""
    from safetensors.torch import load_file

    from swift_dist.models import find_family

    @cache
    def save(name: str) -> Any:
        folder = tmp_path_factory.mktemp(name)
        tiny_models.save_tiny_model(name, folder)
        hf = json.loads((folder / "config.json").read_text())
        family, tensors = find_family(hf), load_file(folder / "model.safetensors")
        hf = family.for_folder(hf, tensors.keys())
        return SimpleNamespace(name=name, folder=folder, hf=hf, family=family, rows=family.rows(hf), tensors=tensors)

    return save


@pytest.fixture(scope="session", params=sorted(tiny_models.CONFIGS))
def saved(request: pytest.FixtureRequest, save_model: Callable[[str], Any]) -> Any:
    """A saved tiny model of each family; see `save_model`."""
    return save_model(request.param)


@pytest.fixture(scope="session", params=sorted(tiny_models.TRAINED))
def trained(request: pytest.FixtureRequest, save_model: Callable[[str], Any]) -> Any:
    """A saved tiny model of each family that the engine trains."""
    return save_model(request.param)


@pytest.fixture
def whole(request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    """The weights of the test's `saved` or `trained` model as whole Megatron tensors, by global name."""
    from swift_dist.converters.mapping import expand, slices

    saved = request.getfixturevalue("trained" if "trained" in request.fixturenames else "saved")
    found = {}
    for tensor in expand(saved.rows):
        values = torch.full(tensor.shape, float("nan"))
        for piece in tensor.pieces:
            values[slices(piece.megatron_box)] = saved.tensors[piece.hf][slices(piece.hf_box)]
        found[tensor.name] = values
    return found
