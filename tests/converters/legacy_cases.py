"""What the tests of legacy checkpoints share: models, layouts, and plans carried out in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from swift_dist.converters.copying import Fill, Unit
from swift_dist.converters.legacy_io import LegacyCheckpoint, LegacySide, check_legacy
from swift_dist.converters.plan import Side, make_plan
from swift_dist.converters.safetensors_io import Layout
from swift_dist.models import find_family
from tests.converters import legacy_files as files
from tests.converters import tiny_models

Cut = files.Cut

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 8},
    "llama_tied": {"head_dim": 8, "tie_word_embeddings": True},
    "qwen3_moe": {},
}
CUTS: dict[str, tuple[str, Any]] = {
    "one file": ("llama", Cut()),
    "tp2": ("llama", Cut(tp=2)),
    "pp2": ("llama", Cut(pp=2, stages=(2, 2))),
    "tp2 pp2": ("llama", Cut(tp=2, pp=2, stages=(2, 2))),
    "uneven pp2": ("llama", Cut(pp=2, stages=(1, 3))),
    "vpp2": ("llama", Cut(pp=2, vpp=2, stages=(1, 1, 1, 1))),
    "norms without TE": ("llama", Cut(tp=2, local=True)),
    "tied": ("llama_tied", Cut(tp=2)),
    "tied tp2 pp2": ("llama_tied", Cut(tp=2, pp=2, stages=(2, 2))),
    "tied vpp2": ("llama_tied", Cut(pp=2, vpp=2, stages=(1, 1, 1, 1))),
    "ep2": ("qwen3_moe", Cut(ep=2)),
    "tp2 ep2": ("qwen3_moe", Cut(tp=2, ep=2)),
    "tp2 ep2 etp1": ("qwen3_moe", Cut(tp=2, ep=2, etp=1)),
    "tp2 ep4 etp1": ("qwen3_moe", Cut(tp=2, ep=4, etp=1)),
    "tp2 etp1": ("qwen3_moe", Cut(tp=2, etp=1)),
    "pp2 ep2": ("qwen3_moe", Cut(pp=2, ep=2, stages=(2, 2))),
    "grouped tp2 pp2 ep2": ("qwen3_moe", Cut(tp=2, pp=2, ep=2, stages=(2, 2), grouped=True)),
}


def save(name: str, folder: Path) -> Any:
    """A saved tiny model of four layers: .folder, .hf, .family, .rows, .shape, .tensors (by HF name)."""
    tiny_models.save_tiny_model(name.removesuffix("_tied"), folder, num_hidden_layers=4, **MODELS[name])
    hf = json.loads((folder / "config.json").read_text())
    family, tensors = find_family(hf), load_file(folder / "model.safetensors")
    rows, shape = family.rows(hf), family.shape(hf)
    hf = family.complete(hf)
    return SimpleNamespace(folder=folder, hf=hf, family=family, rows=rows, shape=shape, tensors=tensors)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """`save`, once for each name."""
    return cache(lambda name: save(name, tmp_path_factory.mktemp(name)))


def fill(rows: Any, source: Side, layout: Layout, target: Side, folder: Path) -> None:
    """Carry out a plan in this process."""
    plan = make_plan(rows, source, target)
    for file in layout.files:
        (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
    work = Fill(str(folder), tuple((file.name, file.size) for file in layout.files), create=True).start()
    for number, file in enumerate(layout.files):
        regions = tuple(region for region in plan.regions if region.stored.extents[0].file == file.name)
        work(Unit((number, 0), regions, file.literals))


def opened(folder: Path, found: Any) -> LegacySide:
    side = LegacySide(LegacyCheckpoint(folder), found.shape.num_layers, found.shape.num_experts or 0)
    check_legacy(side, found.rows)
    return side


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = torch.load(path, weights_only=False)
    edit(content)
    torch.save(content, path)
