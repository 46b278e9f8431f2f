"""`swift-dist sft --list-tuners`: every tuner, and under which strategies it trains as in one process.

The measurements are verified.json beside this file: tests/engines/hf/test_tuner_matrix.py writes it (`make tables`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from swift_dist.config.section import Section
from swift_dist.plugins import find, names

VERIFIED = Path(__file__).with_name("verified.json")
STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


class ListOptions(Section):
    """`sft --list-tuners` takes no options."""


def run(options: ListOptions) -> dict[str, Any]:
    """Every tuner.

    Returns:
        ``{"tuners", "tolerance", "measured"}``. A tuner: ``name``, ``summary``, ``saves``, and by strategy either
        ``refused`` (the reason) or the largest relative difference of loss and gradient norm from one process.
    """
    verified = json.loads(VERIFIED.read_text(encoding="utf-8"))
    tuners = []
    for name in names("swift_dist.tuners"):
        tuner = find("swift_dist.tuners", name, "TUNER")
        cells = verified["tuners"].get(name, {})
        tuners.append({"name": name, "summary": tuner.summary, "saves": tuner.saves, "strategies": cells})
    measured = {key: verified[key] for key in ("date", "versions")}
    return {"tuners": tuners, "tolerance": verified["tolerance"], "measured": measured}


def render(result: dict[str, Any]) -> str:
    """The table for people."""
    width = max(len(tuner["name"]) for tuner in result["tuners"])
    lines = [f"{'tuner'.ljust(width)}  {'  '.join(name.ljust(7) for name in STRATEGIES)}  what it is"]
    reasons = []
    for tuner in result["tuners"]:
        cells = []
        for strategy in STRATEGIES:
            cell = tuner["strategies"].get(strategy)
            cells.append(_cell(cell, result["tolerance"]).ljust(7))
            if cell and cell.get("refused"):
                reasons.append(f"  {tuner['name']} under {strategy}: {cell['refused']}")
        lines.append(f"{tuner['name'].ljust(width)}  {'  '.join(cells)}  {tuner['summary']}")
    versions = ", ".join(f"{name} {version}" for name, version in result["measured"]["versions"].items())
    lines += [
        "",
        f"yes: loss and gradient norm of 5 steps on 2 ranks are those of one process within {result['tolerance']:g}",
        f"measured {result['measured']['date']} on CPU with {versions}",
        *(["", "refused:"] if reasons else []),
        *reasons,
    ]
    return "\n".join(lines)


def _cell(cell: dict[str, Any] | None, tolerance: float) -> str:
    if cell is None:
        return "?"
    if cell.get("refused"):
        return "-"
    return "yes" if cell["difference"] <= tolerance else "no"
