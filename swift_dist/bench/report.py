"""What `swift-dist bench length` leaves: length.json, a table (length.md) and a plot (length.svg, length.png)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swift_dist.runs.files import write_atomically, write_json, write_whole

_COLOURS = ("#9db7d5", "#1f4e8c", "#d1495b", "#edae49", "#66a182", "#8a8a8a")


def write_report(folder: Path, result: dict[str, Any]) -> None:
    """Each file in one move; the plot once all searches have ended."""
    write_json(folder / "length.json", result)
    write_atomically(folder / "length.md", "\n".join(page(result)) + "\n")
    if result["complete"] and any(row["longest"] for row in result["rows"]):
        for kind, content in draw(result).items():
            write_whole(folder / f"length.{kind}", content)


def page(result: dict[str, Any]) -> list[str]:
    """Lines of Markdown."""
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "transformers", "swift-dist"))
    counted = "what torch's allocator holds" if result["on_cuda"] else "the peak resident size of its process"
    lines = [
        f"Longest sequence of {result['model']} within {_within(result)} a rank ({counted}), {result['date'][:10]}, "
        f"{versions}.",
        f"Found to an eighth of a doubling between {result['min_length']:,} and {result['max_length']:,} tokens, each "
        "try in processes of its own. A line has the features of those above it, too. Seconds are of a step at the "
        "longest length, with one sequence for each group of ranks.",
        "",
        f"    {result['command']}",
        "",
        *table(result["rows"]),
        *(f"\nWithout {name}: {why}." for name, why in result["left_out"].items()),
    ]
    return lines if result["complete"] else [*lines, "", "Not complete: the same command goes on."]


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A Markdown table, a row for each number of ranks and set of features."""
    lines = [
        "| ranks a sequence | features | longest (tokens) | times the first | seconds a step | tokens/s | peak (GiB) | "
        "ended by |",
        "|---:|---|---:|---:|---:|---:|---:|---|",
    ]
    first = next((row["longest"] for row in rows if row["longest"]), None)
    for row in rows:
        features = row["features"] if row["features"] == "base" else f"+ {row['features']}"
        if row["longest"] is None:
            cells = ["none", "", "", "", ""]
        else:
            cells = [
                f"{row['longest']:,}",
                f"{row['longest'] / first:.2f}" if first else "",
                f"{row['step_seconds']:.3g}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['peak_gib']:.2f}",
            ]
        ended = f"{row['ended_by']} at {row['too_long']:,}" if row["too_long"] else row["ended_by"]
        ranks = str(row["sharing"]) if row["sharing"] == row["ranks"] else f"{row['sharing']} of {row['ranks']}"
        lines.append(f"| {' | '.join([ranks, features, *cells, ended])} |")
    return lines


def draw(result: dict[str, Any]) -> dict[str, bytes]:
    """The plot as ``svg`` and ``png``: bars by set of features, one for each number of ranks; a scale of doublings."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = result["rows"]
    sets = list(dict.fromkeys(row["features"] for row in rows))
    sizes = list(dict.fromkeys(row["sharing"] for row in rows))
    figure = Figure(figsize=(1.6 + 1.5 * len(sets), 4.2), dpi=110, layout="constrained")  # no pyplot: nothing global
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.8 / len(sizes)
    for place, size in enumerate(sizes):
        mine = [row for row in rows if row["sharing"] == size and row["longest"]]
        at = [sets.index(row["features"]) + (place - (len(sizes) - 1) / 2) * width for row in mine]
        label = "1 rank" if size == 1 else f"{size} ranks a sequence"
        bars = axes.bar(
            at, [row["longest"] for row in mine], width * 0.92, color=_COLOURS[place % len(_COLOURS)], label=label
        )
        axes.bar_label(bars, [_short(row["longest"]) for row in mine], fontsize=8)
    longest = [row["longest"] for row in rows if row["longest"]]
    axes.set_yscale("log", base=2)
    axes.set_ylim(min(longest) / 2, max(longest) * 2)
    axes.yaxis.set_major_formatter(lambda value, _: _short(value))
    axes.set_ylabel("longest sequence (tokens)")
    axes.set_xticks(range(len(sets)), [name if name == "base" else f"+ {name}".replace("_", "\n") for name in sets])
    axes.set_title(f"{result['model']}, {_within(result)} a rank", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return {kind: _saved(figure, kind) for kind in ("svg", "png")}


def _within(result: dict[str, Any]) -> str:
    return "a GPU" if result["memory"] is None else f"{result['memory'] / 2**30:.4g} GiB"


def _saved(figure: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind)
    return buffer.getvalue()


def _short(length: float) -> str:
    """As people say lengths: in K and M of 1024."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if length >= size:
            return f"{length / size:.3g}{unit}"
    return f"{length:g}"
