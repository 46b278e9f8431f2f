"""A run's curves as one PNG: loss (with evaluations), gradient norm, throughput, learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from swift_dist.errors import RunError
from swift_dist.runs.metrics import Row, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RAW, SMOOTH, EVAL, MARK = "#9db7d5", "#1f4e8c", "#d1495b", "#8a8a8a"


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Exponential moving average with the bias of its start removed: s_i = sum_j b^(i-j) x_j / sum_j b^(i-j).

    b = 1 - 2 / (span + 1). Values that are not finite are passed over.
    """
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    result = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        result.append(total / weight if weight else math.nan)
    return result


def draw_run(metrics: Path, target: Path, *, title: str, span: int | None = None) -> int:
    """Draw `metrics` (a metrics.jsonl) to the PNG `target`.

    Args:
        title: stands above the panels.
        span: steps that the smoothed lines average over (default: a twentieth of the run, at least 5).

    Returns:
        The number of steps drawn.

    Raises:
        RunError: if there is no step yet.
    """
    rows = read_metrics(metrics)
    steps = [row for row in rows if "loss" in row]
    if not steps:
        raise RunError(f"{metrics} holds no step yet", "wait for the first step")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    span = span or max(5, len(steps) // 20)
    figure = Figure(figsize=(12, 7.5), dpi=110, layout="constrained")  # no pyplot: nothing global, no display
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    loss, grad, speed, rate = figure.subplots(2, 2).flat
    _draw_loss(loss, steps, [row for row in rows if row.get("eval_loss") is not None], span)
    _draw_line(grad, steps, "grad_norm", span, "gradient norm (before clipping)")
    _draw_line(speed, steps, "tokens_per_second", span, "tokens / s")
    speed.set_ylim(bottom=0)
    _draw_line(rate, steps, "lr", None, "learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (loss, grad, speed, rate):
        _finish(axes, rows)
    figure.savefig(target, format="png")
    return len(steps)


def _column(rows: Sequence[Row], name: str) -> list[float]:
    return [math.nan if row.get(name) is None else float(row[name]) for row in rows]


def _draw_loss(axes: Axes, steps: Sequence[Row], evaluations: Sequence[Row], span: int) -> None:
    _draw_line(axes, steps, "loss", span, "loss (nats / token)")
    if evaluations:
        x = [row["step"] for row in evaluations]
        axes.plot(x, _column(evaluations, "eval_loss"), "o-", color=EVAL, markersize=4, linewidth=1, label="validation")
    skipped = [row["step"] for row in steps if row.get("skipped")]
    if skipped:
        low = axes.get_ylim()[0]
        axes.plot(skipped, [low] * len(skipped), "x", color=EVAL, label="skipped", clip_on=False)


def _draw_line(axes: Axes, rows: Sequence[Row], name: str, span: int | None, label: str) -> None:
    x, y = [row["step"] for row in rows], _column(rows, name)
    if span is None:
        axes.plot(x, y, color=SMOOTH, linewidth=1.6)
    else:
        axes.plot(x, y, color=RAW, linewidth=0.9, label="each step")
        axes.plot(x, smooth(y, span), color=SMOOTH, linewidth=1.8, label=f"smoothed over {span} steps")
    axes.set_ylabel(label)


def _finish(axes: Axes, rows: Sequence[Row]) -> None:
    resumed = [row["resumed_from"] for row in rows if row.get("resumed_from")]
    for i, step in enumerate(resumed):
        axes.axvline(step, color=MARK, linestyle=":", linewidth=1.2, label="resumed" if i == 0 else None)
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
