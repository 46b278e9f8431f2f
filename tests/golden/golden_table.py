"""One cell of the golden table, and the table as a document."""

from __future__ import annotations

import datetime
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import golden_cases as cases

from swift_dist.models import find_family
from swift_dist.parallel import check_layout


@dataclass(frozen=True)
class Cell:
    """Largest relative errors over the steps."""

    loss_error: float
    norm_error: float

    @property
    def worst(self) -> float:
        return max(self.loss_error, self.norm_error)


def refusals(model: str, layout: str) -> tuple[str, ...]:
    """The rules that make a cell impossible."""
    config = cases.MODELS[model]
    violations = check_layout(
        cases.layout(layout),
        find_family(config).shape(config),
        sequence_length=cases.SEQUENCE,
        micro_batch_size=1,
        global_batch_size=cases.GLOBAL_BATCH,
    )
    return tuple(violation.rule for violation in violations)


def run(gang: Any, reference: tuple[Path, list[tuple[float, float]]], model: str, layout: str) -> Cell:
    """Train a cell and compare it; every rank must report the same numbers."""
    folder, expected = reference
    world = cases.layout(layout).world_size
    ranks = Path(__file__).with_name("golden_ranks.py")
    results = gang.run(ranks, "train", world, job=cases.job(model, layout), weights=str(folder), steps=len(expected))
    return compare(results, expected)


def compare(results: list[list[tuple[float, float]]], expected: list[tuple[float, float]]) -> Cell:
    """All ranks' (loss, gradient norm) of each step against the reference's."""
    assert all(result == results[0] for result in results), "ranks disagree"
    pairs = list(zip(results[0], expected, strict=True))
    return Cell(
        max(abs(ours[0] - theirs[0]) / theirs[0] for ours, theirs in pairs),
        max(abs(ours[1] - theirs[1]) / theirs[1] for ours, theirs in pairs),
    )


def write(cells: dict[tuple[str, str], Cell | tuple[str, ...]], path: Path, tolerance: float) -> None:
    """The table as Markdown: relative errors of loss / gradient norm, or the rule by which a cell is impossible."""
    packages = ("torch", "megatron-core", "transformers")
    lines = [
        "# Golden parity",
        "",
        f"Largest relative error of loss / gradient norm over {cases.STEPS} optimizer steps against plain transformers",
        f"and torch AdamW (fp32, no dropout, random weights); allowed: {tolerance:g}. `n/a`: the layout is impossible.",
        "Rewritten by `make tables`. Models and layouts: `tests/golden/golden_cases.py`.",
        "",
        f"{datetime.date.today()}; Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in packages)
        + "; CPU, gloo",
        "",
        "| | " + " | ".join(cases.MODELS) + " |",
        "|---|" + "---|" * len(cases.MODELS),
    ]
    for layout in cases.LAYOUTS:
        entries = [_entry(cells[model, layout]) for model in cases.MODELS]
        lines.append(f"| {layout} | " + " | ".join(entries) + " |")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def _entry(cell: Cell | tuple[str, ...]) -> str:
    if isinstance(cell, Cell):
        return f"{cell.loss_error:.0e} / {cell.norm_error:.0e}"
    return "n/a: " + ", ".join(cell)
