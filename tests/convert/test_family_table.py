"""Every family through both verbs: back again bit for bit, and computing what transformers computes at every layout.

`pytest tests/convert` runs the round trips and some layouts; `pytest -m table tests/convert` all, and rewrites
swift_dist/convert/verified.json and docs/tables/families.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import family_table as table
import pytest

from swift_dist.convert.listing import passes, read_verified
from swift_dist.models import families

SUBSET = [
    ("llama", ["TP2", "PP2"]),
    ("qwen2", ["PP2xVPP2"]),  # tied embeddings: on the first and on the last stage
    ("qwen3_moe", ["TP2PP2", "EP2"]),
]


@pytest.fixture(scope="session")
def gang() -> Iterator[Any]:
    from gang import Gang

    ranks = Gang()
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SimpleNamespace]:
    """A model's folder and its checkpoint, by name; made once."""

    @cache
    def make(name: str) -> SimpleNamespace:
        base = tmp_path_factory.mktemp(name)
        table.write_model(name, base / "hf")
        checkpoint = table.to_megatron(base / "hf", base / "checkpoint")
        return SimpleNamespace(base=base, hf=base / "hf", checkpoint=checkpoint)

    return make


def trip_of(model: SimpleNamespace) -> dict[str, int]:
    return table.round_trip(model.hf, table.to_hf(model.checkpoint, model.base / "back"))


@pytest.mark.parametrize("name", table.NAMES)
def test_back_again_bit_for_bit(converted: Callable[[str], SimpleNamespace], name: str) -> None:
    found = trip_of(converted(name))
    assert found["equal"] == found["tensors"] > 30


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layouts"), SUBSET, ids=[name for name, _ in SUBSET])
def test_megatron_computes_what_transformers_computes(
    converted: Callable[[str], SimpleNamespace], tmp_path: Path, name: str, layouts: list[str]
) -> None:
    model = converted(name)
    cells = table.logits(model.hf, model.checkpoint, layouts, tmp_path)
    assert all(passes(cell, table.TOLERANCE) for cell in cells.values()), cells


@pytest.mark.table
@pytest.mark.parametrize("name", table.NAMES)
def test_whole_table(converted: Callable[[str], SimpleNamespace], gang: Any, tmp_path: Path, name: str) -> None:
    model = converted(name)
    trip = trip_of(model)
    if table.is_trained(name):
        cells = table.logits(model.hf, model.checkpoint, table.layouts_of(name), tmp_path)
    else:
        request = {"hf": str(model.hf), "checkpoint": str(model.checkpoint)}
        cells = {"TP1": gang.run(table.__file__, "logits_in_a_rank", 1, **request)[0]}
    table.record(name, trip, cells)
    assert trip["equal"] == trip["tensors"]
    assert all(passes(cell, table.TOLERANCE) for cell in cells.values()), cells


def test_the_recorded_table_is_whole_and_good() -> None:
    verified = read_verified()
    assert list(verified["models"]) == list(table.NAMES)
    assert {model["family"] for model in verified["models"].values()} == {family.name for family in families()}
    for name, model in verified["models"].items():
        assert list(model["layouts"]) == table.layouts_of(name), f"make tables: {name}"
        assert all(passes(cell, verified["tolerance"]) for cell in model["layouts"].values()), name
        assert model["round_trip"]["equal"] == model["round_trip"]["tensors"] > 30
    assert verified["tolerance"] == table.TOLERANCE


def test_the_page_says_what_is_recorded() -> None:
    assert table.PAGE.read_text(encoding="utf-8") == table.page(read_verified())


def test_a_changed_bit_a_missing_and_a_surplus_tensor_show(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    before = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    for number, after in enumerate(
        [
            before,
            {**before, "a": torch.tensor([[0.0, 0.0, -0.0], [0.0, 0.0, 0.0]])},
            {"b": before["b"]},
            {**before, "c": torch.ones(2)},
            {**before, "a": torch.zeros(3, 2)},
        ]
    ):
        folders = [tmp_path / f"{kind}{number}" for kind in ("before", "after")]
        for folder, tensors in zip(folders, (before, after), strict=True):
            folder.mkdir()
            save_file(tensors, folder / "model.safetensors")
        found = table.round_trip(*folders)
        assert (found["equal"] == found["tensors"]) is (number == 0)
