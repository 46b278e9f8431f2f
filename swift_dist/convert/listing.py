"""`swift-dist convert --list`: which models are converted, and what was measured of their conversions.

The measurements are verified.json beside this file: tests/convert/test_family_table.py writes it (`make tables`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swift_dist.config import Section
from swift_dist.models import Family, families

VERIFIED = Path(__file__).with_name("verified.json")


class ListOptions(Section):
    """`convert --list` takes no options."""


def read_verified(file: Path = VERIFIED) -> dict[str, Any]:
    """The measurements.

    Returns:
        ``{"tolerance", "models"}``. A model is a small random one of a family, by name: ``family``; ``date`` and
        ``versions`` of its measurement; ``round_trip``: how many ``tensors`` it has and how many were ``equal`` bit for
        bit after Hugging Face -> torch_dist -> Hugging Face; ``layouts``, by name: the largest difference of its logits
        from transformers', ``relative`` to the largest logit, whether every position had the ``same_argmax``, and
        ``error``, null where there are numbers.
    """
    return dict(json.loads(file.read_text(encoding="utf-8")))


def passes(cell: Mapping[str, Any], tolerance: float) -> bool:
    """Whether the numbers of a layout are good."""
    return cell["error"] is None and cell["relative"] <= tolerance and cell["same_argmax"] is True


def run(options: ListOptions) -> dict[str, Any]:
    """Every family.

    Returns:
        ``{"families", "tolerance", "measured"}``. A family: ``name``, ``architectures``, ``trained`` (or else only
        converted), ``models`` that were measured, ``layouts`` that all of them passed at, each with its largest
        difference, ``failed`` layouts, and ``round_trip`` over all models. Measured: date and versions of each model.
    """
    verified = read_verified()
    return {
        "families": [_describe(family, verified) for family in families()],
        "tolerance": verified["tolerance"],
        "measured": {
            name: {"date": model["date"], "versions": model["versions"]} for name, model in verified["models"].items()
        },
    }


def _describe(family: Family, verified: Mapping[str, Any]) -> dict[str, Any]:
    models = {name: model for name, model in verified["models"].items() if model["family"] == family.name}
    cells: dict[str, list[dict[str, Any]]] = {}
    for model in models.values():
        for layout, cell in model["layouts"].items():
            cells.setdefault(layout, []).append(cell)
    failed = [name for name, found in cells.items() if not all(passes(cell, verified["tolerance"]) for cell in found)]
    trips = [model["round_trip"] for model in models.values()]
    return {
        "name": family.name,
        "architectures": list(family.architectures),
        "trained": family.trainable,
        "models": list(models),
        "layouts": {
            name: max(cell["relative"] for cell in found) for name, found in cells.items() if name not in failed
        },
        "failed": failed,
        "round_trip": {key: sum(trip[key] for trip in trips) for key in ("tensors", "equal")},
    }


def render(result: Mapping[str, Any]) -> str:
    """One line a family."""
    rows: list[tuple[str, ...]] = [("family", "architectures", "", "round trip", "logits", "at")]
    rows += [_row(family) for family in result["families"]]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)) for row in rows]
    notes = [
        "round trip: tensors equal bit for bit after Hugging Face -> torch_dist -> Hugging Face.",
        "logits: largest difference from transformers', relative to the largest logit, of checkpoints that",
        f"megatron-core loaded at these layouts (allowed: {result['tolerance']:g}, and the same likeliest token).",
        *(f"Small random models in fp32; {text}" for text in measurements(result["measured"])),
    ]
    return "\n".join(line.rstrip() for line in [*lines, "", *notes])


def measurements(measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """When and with what the models were measured: one line for all that were measured alike."""
    alike: dict[str, list[str]] = {}
    for name, entry in measured.items():
        text = ", ".join([entry["date"], *(f"{key} {value}" for key, value in entry["versions"].items())])
        alike.setdefault(text, []).append(name)
    return [text if len(alike) == 1 else f"{', '.join(names)}: {text}" for text, names in alike.items()]


def _row(family: Mapping[str, Any]) -> tuple[str, ...]:
    trip = family["round_trip"]
    architectures, use = ", ".join(family["architectures"]), "trained" if family["trained"] else "converted only"
    if not family["models"]:
        return (family["name"], architectures, use, "not measured", "", "")
    worst = f"{max(family['layouts'].values()):.0e}" if family["layouts"] else ""
    layouts = " ".join([*family["layouts"], *(f"NOT {name}" for name in family["failed"])])
    return (family["name"], architectures, use, f"{trip['equal']} of {trip['tensors']}", worst, layouts)
