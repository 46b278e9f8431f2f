"""What recipes there are and what one says. The listing is the folder; there is no list to edit."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pydantic import Field

from swift_dist.config.section import Section
from swift_dist.errors import JobError

_FOLDER = Path(__file__).parent


class ListOptions(Section):
    """`recipes list` takes no options."""


class ShowOptions(Section):
    name: str = Field(description="a recipe, as `recipes list` names it")


def list_recipes() -> tuple[str, ...]:
    """Names of the shipped recipes, smaller models and fewer GPUs first within a model line."""
    return tuple(sorted((path.stem for path in _FOLDER.glob("*.yaml")), key=_natural))


def recipe_path(name: str) -> Path | None:
    """The file of a recipe; None: there is no recipe of that name."""
    stem = name.removesuffix(".yaml")
    return _FOLDER / f"{stem}.yaml" if stem in list_recipes() else None


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe's content, as parsed from YAML.

    Raises:
        JobError: there is no such recipe; names the ones nearest in spelling.
    """
    from swift_dist.config.load import read_yaml

    return read_yaml(_require(name))


def list_verb(options: ListOptions) -> dict[str, Any]:
    """`recipes list`: every recipe with its headline, size, ranks, layout, and whether the engine trains its family."""
    return {"recipes": [_describe(name) for name in list_recipes()]}


def render_list(result: dict[str, Any]) -> str:
    """One line a recipe."""
    rows = [("recipe", "parameters", "active", "GPUs", "layout", "")]
    rows += [
        (
            r["name"],
            _billions(r["num_parameters"]),
            _billions(r["num_active_parameters"]),
            str(r["gpus"]),
            r["layout"],
            "" if r["supported"] else f"family {r['model_type']!r} is not trained yet",
        )
        for r in result["recipes"]
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)) for row in rows]
    usage = "Run one: swift-dist pretrain NAME --dataset PREFIX   Read one: swift-dist recipes show NAME"
    return "\n".join(line.rstrip() for line in [*lines, "", usage])


def show_verb(options: ShowOptions) -> dict[str, Any]:
    """`recipes show NAME`: the description of `recipes list`, and the file's text and content."""
    text = _require(options.name).read_text(encoding="utf-8")
    return {**_describe(options.name), "text": text, "job": read_recipe(options.name)}


def render_show(result: dict[str, Any]) -> str:
    """The file as it is, comments included, so that it can be redirected into a job file."""
    return str(result["text"]).rstrip("\n")


def _require(name: str) -> Path:
    path = recipe_path(name)
    if path is None:
        near = difflib.get_close_matches(name, list_recipes(), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "swift-dist recipes list names them"
        raise JobError("name", f"there is no recipe {name!r}; {hint}", "swift-dist recipes list")
    return path


def _describe(name: str) -> dict[str, Any]:
    from swift_dist.config import ParallelSection
    from swift_dist.models import find_family
    from swift_dist.parallel import ParallelLayout

    job, path = read_recipe(name), _require(name)
    hf = job["model"]["config"]
    family = find_family(hf)
    shape = family.shape(hf)
    gpus = job["cluster"]["nnodes"] * job["cluster"]["nproc_per_node"]
    layout = ParallelLayout.resolve(ParallelSection(**(job["parallel"] or {})), gpus, shape.is_moe)
    return {
        "name": path.stem,
        "title": path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# "),
        "model_type": hf["model_type"],
        "supported": family.trainable,
        "num_parameters": shape.num_parameters(),
        "num_active_parameters": shape.num_active_parameters(),
        "gpus": gpus,
        "layout": layout.summary(),
        "path": str(path),
    }


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count < 100e9 else f"{count / 1e9:.0f}B"


def _natural(name: str) -> list[tuple[int, float, str]]:
    """Sort key that reads numbers as numbers: 8b before 70b, 64gpu before 512gpu."""
    parts: list[tuple[int, float, str]] = []
    for token in name.split("-"):
        digits = len(token) - len(token.lstrip("0123456789."))
        parts.append((0, float(token[:digits]), token[digits:]) if digits else (1, 0.0, token))
    return parts
