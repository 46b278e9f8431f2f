"""Golden parity: the engine's loss and gradient norm over 4 optimizer steps equal plain transformers + torch AdamW.

`pytest tests/golden` runs a subset with every family and every layout; `pytest -m table tests/golden` runs all cells
and rewrites docs/tables/golden.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import golden_cases as cases
import golden_table as table
import pytest

TOLERANCE = 1e-5

SUBSET = [
    ("llama", "TP1"),
    ("llama", "TP2"),
    ("llama", "CP2"),
    ("llama-tied", "PP2xVPP2"),
    ("mistral", "TP2+SP"),
    ("mistral", "CP2"),
    ("qwen2", "PP2"),
    ("qwen2", "DP2+distopt"),
    ("qwen2-window", "TP1"),
    ("qwen3", "PP2xVPP2"),
    ("qwen3", "TP2CP2DP2"),
    ("qwen3_moe", "EP2"),
    ("qwen3_moe", "TP2PP2DP2+SP"),
    ("qwen3_moe-mixed", "EP2"),
    ("qwen3_moe-mixed", "CP2"),
]


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """References by model name, each computed once, when it is first asked for."""
    known: dict[str, tuple[Path, list[tuple[float, float]]]] = {}

    def get(name: str) -> tuple[Path, list[tuple[float, float]]]:
        import golden_reference as reference

        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            model = reference.make_model(cases.MODELS[name])
            reference.save(model, folder)
            known[name] = folder, reference.train(model)
        return known[name]

    return get


def test_subset_covers_every_family_and_layout() -> None:
    assert {cases.MODELS[model]["model_type"] for model, _ in SUBSET} == {
        config["model_type"] for config in cases.MODELS.values()
    }
    assert {name for _, name in SUBSET} == set(cases.LAYOUTS)


@pytest.mark.parametrize(("model", "layout"), SUBSET)
def test_parity(gang: Any, references: Any, model: str, layout: str) -> None:
    assert not table.refusals(model, layout), "the subset has possible cells only"
    cell = table.run(gang, references(model), model, layout)
    assert cell.loss_error <= TOLERANCE
    assert cell.norm_error <= TOLERANCE


@pytest.mark.table
@pytest.mark.timeout(3600)
def test_whole_table(gang: Any, references: Any) -> None:
    cells = {
        (model, layout): table.refusals(model, layout) or table.run(gang, references(model), model, layout)
        for model in cases.MODELS
        for layout in cases.LAYOUTS
    }
    table.write(cells, Path(__file__).parents[2] / "docs" / "tables" / "golden.md", TOLERANCE)
    worst = max(cell.worst for cell in cells.values() if isinstance(cell, table.Cell))
    assert worst <= TOLERANCE
