"""The front as a picture: speed against quality, with bands."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from evaluators.measurement import Measurement
from search.dots import BLUE, NAMED, ROLES, Dot, dots_of, label_of, quality_range, speed_range, staircase, ticks
from search.select import Choice
from search.trial import TrialRecord
from search.view import View


def pareto_png(
    records: Sequence[TrialRecord],
    front: Sequence[TrialRecord],
    choice: Choice,
    path: Path,
    view: View,
) -> None:
    """Speed (logarithmic) against quality with bands, 1200x800; the dots' area is the size."""
    dots = dots_of(records, front, choice, view)
    figure = Figure(figsize=(12, 8), dpi=100, layout="constrained")
    axes = figure.subplots()
    for role, (colour, label, order) in ROLES.items():
        chosen = [d for d in dots if d.role == role]
        if chosen:
            _scatter(axes, chosen, role, colour, label, order)
    steps = staircase(dots)
    axes.step(*zip(*steps, strict=True), where="post", color=BLUE, linewidth=1.5, alpha=0.6, zorder=2)
    low, high = speed_range(dots)
    _names(axes, dots, low, high)
    _frame(axes, dots, view)
    axes.legend(loc="lower right", fontsize=12, framealpha=0.95, markerscale=0.8)
    FigureCanvasAgg(figure).print_png(path)


def _scatter(axes: Any, dots: Sequence[Dot], role: str, colour: str, label: str, order: int) -> None:
    x, y = [d.x.value for d in dots], [d.y.value for d in dots]
    if role != "other":
        axes.errorbar(x, y, yerr=_arms(d.y for d in dots), xerr=_arms(d.x for d in dots), fmt="none",
                      ecolor=colour, elinewidth=1, alpha=0.35, zorder=order)  # fmt: skip
    area = [460] if role == "champion" else [30 + 220 * d.area for d in dots]
    marker = {"champion": "*", "baseline": "D"}.get(role, "o")
    axes.scatter(x, y, s=area, c=colour, marker=marker, label=label, alpha=0.35 if role == "other" else 0.85,
                 edgecolors="white", linewidths=0.8, zorder=order)  # fmt: skip


def _arms(measurements: Iterable[Measurement]) -> list[list[float]]:
    pairs = [(m.value - m.interval[0], m.interval[1] - m.value) for m in measurements]
    return [[low for low, _ in pairs], [high for _, high in pairs]]


def _names(axes: Any, dots: Iterable[Dot], low: float, high: float) -> None:
    """Baselines often lie close together, so their names stand at different heights; on the right they point left."""
    named = sorted((d for d in dots if d.role in NAMED), key=lambda d: d.x.value)
    for i, dot in enumerate(named):
        left = math.log(dot.x.value / low) > 0.75 * math.log(high / low)
        axes.annotate(
            label_of(dot), (dot.x.value, dot.y.value), xytext=(-8 if left else 8, 14 + 17 * (i % 3)),
            textcoords="offset points", ha="right" if left else "left", fontsize=11, color=ROLES[dot.role][0], zorder=6,
        )  # fmt: skip


def _frame(axes: Any, dots: Sequence[Dot], view: View) -> None:
    (left, right), (low, high) = speed_range(dots), quality_range(dots)
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(ticks(left, right)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}\n{1 / x:.3g}x"))
    axes.tick_params(labelsize=12)
    axes.set_xlabel(f"{view.speed} (speed-up below)", fontsize=13)
    axes.set_ylabel(view.quality, fontsize=13)
    axes.grid(alpha=0.25)
    hidden = sum(not low <= d.y.value <= high for d in dots)
    title = f"{len(dots)} measured trials" + (f", {hidden} of them below {low:.3g} and not shown" if hidden else "")
    axes.set_title(title, fontsize=13, loc="left")
