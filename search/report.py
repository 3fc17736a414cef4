"""What people see of a study: a table, pictures and a page, made from records; measures and chooses nothing."""

import html
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray
from rich.table import Table

from compressors.layers import inside
from compressors.plan import LayerSpec, Scalar, Settings
from evaluators.measurement import Measurement
from search.pareto import differ
from search.select import Choice, baselines
from search.trial import TrialRecord

BLUE, ORANGE, RED, GREY = "#1f5fa8", "#e07b00", "#c8102e", "#9aa3ad"
# Sizes are exact, but few people care about 5 % either way.
SIZE_BAND = 1.05
FULL_BITS = {"fp32": 32, "bf16": 16, "fp16": 16}


@dataclass(frozen=True, slots=True)
class View:
    """Which metrics are shown as quality, speed, time and size."""

    quality: str = "accuracy"
    speed: str = "latency_ratio"
    time: str = "latency_ms"
    size: str = "size_bytes"


def draw(
    folder: Path,
    records: Sequence[TrialRecord],
    front: Sequence[TrialRecord],
    choice: Choice,
    layers: Sequence[LayerSpec],
    view: View = View(),
) -> list[Path]:
    """Write every picture and page of a study into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("pareto.png", "pareto.html", "layers.png", "report.json")
    png, page, heat, table = (folder / name for name in names)
    pareto_png(records, front, choice, png, view)
    pareto_html(records, front, choice, page, view)
    layers_png(front, layers, heat)
    table.write_text(json.dumps([_plain(r, front, choice, view) for r in front], indent=1))
    return [png, page, heat, table]


# -- The table


def front_table(
    records: Sequence[TrialRecord],
    front: Sequence[TrialRecord],
    choice: Choice,
    view: View = View(),
) -> Table:
    """Champion, baselines and what of the front can be told apart, fastest first."""
    table = Table(title="the front (★ champion, ○ uncompressed)", title_justify="left", caption_justify="left")
    for heading in ("trial", "what was done", view.quality, "latency ratio", "speed-up", "ms", "size"):
        table.add_column(
            heading, justify="left" if heading == "what was done" else "right", no_wrap=heading != "what was done"
        )
    shown = _told_apart(front, choice, view)
    rows = {r.number: r for r in (*shown, *baselines(records), choice.record)}
    on_front = {r.number for r in front}
    for record in sorted(rows.values(), key=lambda r: r.value(view.speed).value):
        style = "bold" if record.number == choice.record.number else "" if record.number in on_front else "dim"
        table.add_row(*_cells(record, choice, view), style=style)
    table.caption = "\n".join(_left_out(records, len(front) - len(shown)))
    return table


def _told_apart(front: Sequence[TrialRecord], choice: Choice, view: View) -> list[TrialRecord]:
    """Of members alike within their bands, and in size within `SIZE_BAND`, the champion or else the smallest."""
    kept: list[TrialRecord] = []
    for record in sorted(front, key=lambda r: (r.number != choice.record.number, _size(r, view))):
        if all(differ(_looks(record, view), _looks(other, view)) for other in kept):
            kept.append(record)
    return kept


def _looks(record: TrialRecord, view: View) -> list[Measurement]:
    size = _optional(record, view.size)
    about = [replace(size, interval=(size.value / SIZE_BAND, size.value * SIZE_BAND))] if size else []
    return [*record.values((view.quality, view.speed)), *about]


def _size(record: TrialRecord, view: View) -> float:
    size = _optional(record, view.size)
    return size.value if size else 0.0


def _left_out(records: Sequence[TrialRecord], alike: int) -> Iterator[str]:
    if alike:
        yield f"{alike} more of the front are within the bands of these, see report.json"
    stopped = sum(r.stopped is not None for r in records)
    if stopped:
        yield f"{stopped} of {len(records)} trials were stopped early, out of reach of the front"


def describe(record: TrialRecord) -> str:
    """What was done, in a few words; speaks of any method that reports a key which is known here."""
    steps = [_step(s.method, s.shared, record.achieved.get(s.method, s.per_layer)) for s in record.plan.steps]
    target = f"{record.plan.target.runtime} {record.plan.target.precision}"
    return ", ".join([*(steps or ["uncompressed"]), target])


def _step(method: str, shared: Settings, achieved: Mapping[str, Settings]) -> str:
    for key, words in (("clusters", "{} clusters"), ("bits", "int{}")):
        counts = Counter(s[key] for s in achieved.values() if s.get(key))
        if counts:
            found = sorted(counts.items(), reverse=True)
            return ", ".join(f"{words.format(value)} {n} layer{'s' * (n > 1)}" for value, n in found)
    shares = [100 * float(s["sparsity"]) for s in achieved.values() if "sparsity" in s]
    if shares:
        low, high = round(min(shares)), round(max(shares))
        return f"{method} {low} %" if low == high else f"{method} {low}-{high} %"
    skipped = sum(bool(s["skip"]) for s in achieved.values() if "skip" in s)
    if skipped:
        return f"skip {skipped} block{'s' * (skipped > 1)}"
    replaced = sum("weights" in s for s in achieved.values())
    if replaced:
        return f"{method} {replaced} layer{'s' * (replaced > 1)}"
    return f"{method} {shared['epochs']} epochs" if "epochs" in shared else method


def _cells(record: TrialRecord, choice: Choice, view: View) -> list[str]:
    quality, speed = record.values((view.quality, view.speed))
    mark = "★ " if record.number == choice.record.number else "○ " if not record.plan.steps else ""
    time = _optional(record, view.time)
    return [
        f"{mark}{record.number}",
        describe(record),
        quality_text(quality),
        f"{speed.value:.3f} [{speed.interval[0]:.3f}, {speed.interval[1]:.3f}]",
        f"{1 / speed.value:.2f}x",
        f"{time.value:.3f}" if time else "",
        _bytes(record, view),
    ]


def quality_text(measurement: Measurement) -> str:
    """A share in per cent, anything else as it is, with its band."""
    value, low, high = measurement.value, *measurement.interval
    if measurement.metric.unit in SHARES:
        return f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{value:.4g} [{low:.4g}, {high:.4g}]"


SHARES = ("share", "agreement")


def _optional(record: TrialRecord, metric: str) -> Measurement | None:
    return next((m for m in record.measurements if m.name == metric), None)


def _bytes(record: TrialRecord, view: View) -> str:
    size = _optional(record, view.size)
    if size is None:
        return ""
    return f"{size.value / 1e6:.2f} MB" if size.value >= 1e6 else f"{size.value / 1e3:.1f} kB"


# -- The picture of the front


@dataclass(frozen=True)
class _Dot:
    """One measured trial as both pictures show it; `x` is speed, `y` is quality, `area` in 0..1 is size."""

    record: TrialRecord
    role: str
    x: Measurement
    y: Measurement
    area: float


def pareto_png(
    records: Sequence[TrialRecord],
    front: Sequence[TrialRecord],
    choice: Choice,
    path: Path,
    view: View = View(),
) -> None:
    """Speed (logarithmic) against quality with bands, 1200x800; the dots' area is the size."""
    dots = _dots(records, front, choice, view)
    figure = Figure(figsize=(12, 8), dpi=100, layout="constrained")
    axes = figure.subplots()
    for role, (colour, label, order) in ROLES.items():
        chosen = [d for d in dots if d.role == role]
        if chosen:
            _scatter(axes, chosen, role, colour, label, order)
    steps = _staircase(dots)
    axes.step(*zip(*steps, strict=True), where="post", color=BLUE, linewidth=1.5, alpha=0.6, zorder=2)
    low, high = _speed_range(dots)
    _names(axes, dots, low, high)
    _frame(axes, dots, view)
    axes.legend(loc="lower right", fontsize=12, framealpha=0.95, markerscale=0.8)
    FigureCanvasAgg(figure).print_png(path)


ROLES = {
    "other": (GREY, "other trials", 1),
    "front": (BLUE, "on the front (area: size)", 3),
    "baseline": (ORANGE, "uncompressed", 4),
    "champion": (RED, "champion", 5),
}
NAMED = ("baseline", "champion")


def _dots(records: Iterable[TrialRecord], front: Iterable[TrialRecord], choice: Choice, view: View) -> list[_Dot]:
    measured = [r for r in records if r.measured]
    on_front = {r.number for r in front}
    sizes = {r.number: m.value for r in measured if (m := _optional(r, view.size))}
    largest = max(sizes.values(), default=1.0)
    return [
        _Dot(
            record=r,
            role=_role(r, on_front, choice),
            x=r.value(view.speed),
            y=r.value(view.quality),
            area=sizes.get(r.number, largest) / largest,
        )
        for r in measured
    ]


def _role(record: TrialRecord, on_front: set[int], choice: Choice) -> str:
    if record.number == choice.record.number:
        return "champion"
    if not record.plan.steps:
        return "baseline"
    return "front" if record.number in on_front else "other"


def _scatter(axes: Any, dots: Sequence[_Dot], role: str, colour: str, label: str, order: int) -> None:
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


def _staircase(dots: Iterable[_Dot]) -> list[tuple[float, float]]:
    """The best quality that can be had at each speed, from fast to slow."""
    steps: list[_Dot] = []
    for dot in sorted(dots, key=lambda d: d.x.value):
        if not steps or (dot.y.no_worse(steps[-1].y) and dot.y.value != steps[-1].y.value):
            steps.append(dot)
    return [(d.x.value, d.y.value) for d in steps]


def _names(axes: Any, dots: Iterable[_Dot], low: float, high: float) -> None:
    """Baselines often lie close together, so their names stand at different heights; on the right they point left."""
    named = sorted((d for d in dots if d.role in NAMED), key=lambda d: d.x.value)
    for i, dot in enumerate(named):
        left = math.log(dot.x.value / low) > 0.75 * math.log(high / low)
        axes.annotate(
            _label(dot), (dot.x.value, dot.y.value), xytext=(-8 if left else 8, 14 + 17 * (i % 3)),
            textcoords="offset points", ha="right" if left else "left", fontsize=11, color=ROLES[dot.role][0], zorder=6,
        )  # fmt: skip


def _label(dot: _Dot) -> str:
    target = dot.record.plan.target
    return f"{target.runtime} {target.precision}" if dot.role == "baseline" else f"trial {dot.record.number}"


def _frame(axes: Any, dots: Sequence[_Dot], view: View) -> None:
    (left, right), (low, high) = _speed_range(dots), _quality_range(dots)
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(_ticks(left, right)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}\n{1 / x:.3g}x"))
    axes.tick_params(labelsize=12)
    axes.set_xlabel(f"{view.speed} (speed-up below)", fontsize=13)
    axes.set_ylabel(view.quality, fontsize=13)
    axes.grid(alpha=0.25)
    hidden = sum(not low <= d.y.value <= high for d in dots)
    title = f"{len(dots)} measured trials" + (f", {hidden} of them below {low:.3g} and not shown" if hidden else "")
    axes.set_title(title, fontsize=13, loc="left")


def _speed_range(dots: Iterable[_Dot]) -> tuple[float, float]:
    xs = [d.x.value for d in dots]
    return min(xs) / 1.25, max(xs) * 1.25


def _quality_range(dots: Iterable[_Dot]) -> tuple[float, float]:
    """Room for what matters and its bands; a ruined candidate must not squeeze the rest into a line."""
    named = [d.y for d in dots if d.role != "other"]
    values = sorted(m.value for m in named)
    top, middle = values[-1], values[len(values) // 2]
    near = [m for m in named if m.value >= top - max(0.05, 6 * (top - middle))]
    low, high = min(m.interval[0] for m in near), max(m.interval[1] for m in near)
    room = 0.06 * (high - low) or 0.01
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """Round values of a logarithmic axis: 1, 2, 5 and their neighbours, up to a dozen."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [d * 10.0**p for p in powers for d in (1, 1.5, 2, 3, 4, 5, 7)]
    coarse = [d * 10.0**p for p in powers for d in (1, 2, 5)]
    within = [t for t in fine if low <= t <= high]
    return within if len(within) <= 12 else [t for t in coarse if low <= t <= high]


# -- The page


def pareto_html(
    records: Sequence[TrialRecord],
    front: Sequence[TrialRecord],
    choice: Choice,
    path: Path,
    view: View = View(),
) -> None:
    """The same picture as one file without libraries: pointing at a dot shows its plan, a click keeps it shown."""
    dots = _dots(records, front, choice, view)
    scale = _Scale(dots)
    data = {d.record.number: _plain(d.record, front, choice, view) for d in dots}
    text = Template(PAGE).substitute(
        title=html.escape(f"{view.quality} against {view.speed}"),
        reason=html.escape(f"Champion: trial {choice.record.number}, {choice.reason}"),
        width=scale.width,
        height=scale.height,
        legend=" ".join(f'<span style="color: {colour}">● {label}</span>' for colour, label, _ in ROLES.values()),
        drawing="\n".join(_svg(dots, scale, view)),
        # Inside a script element, only `<` could end it.
        data=json.dumps(data).replace("<", "\\u003c"),
    )
    path.write_text(text, encoding="utf-8")


class _Scale:
    """From values to pixels."""

    width, height, left, right, top, bottom = 960, 560, 80, 30, 20, 60

    def __init__(self, dots: Sequence[_Dot]) -> None:
        self.low_x, self.high_x = _speed_range(dots)
        self.low_y, self.high_y = _quality_range(dots)

    def x(self, value: float) -> float:
        share = math.log(value / self.low_x) / math.log(self.high_x / self.low_x)
        return round(self.left + share * (self.width - self.left - self.right), 1)

    def y(self, value: float) -> float:
        share = (min(max(value, self.low_y), self.high_y) - self.low_y) / (self.high_y - self.low_y)
        return round(self.height - self.bottom - share * (self.height - self.top - self.bottom), 1)


def _svg(dots: Sequence[_Dot], scale: _Scale, view: View) -> Iterator[str]:
    yield from _svg_axes(scale, view)
    yield f'<polyline class="stairs" points="{_svg_stairs(dots, scale)}"/>'
    for dot in sorted(dots, key=lambda d: ROLES[d.role][2]):
        yield from _svg_dot(dot, scale)
    named = sorted((d for d in dots if d.role in NAMED), key=lambda d: d.x.value)
    for i, dot in enumerate(named):
        yield _svg_name(dot, scale, 14 + 16 * (i % 3))


def _svg_axes(scale: _Scale, view: View) -> Iterator[str]:
    floor, end = scale.height - scale.bottom, scale.width - scale.right
    for tick in _ticks(scale.low_x, scale.high_x):
        x = scale.x(tick)
        yield f'<line class="grid" x1="{x}" x2="{x}" y1="{scale.top}" y2="{floor}"/>'
        yield f'<text class="tick" x="{x}" y="{floor + 18}" text-anchor="middle">{tick:g}</text>'
    for tick in MaxNLocator(7).tick_values(scale.low_y, scale.high_y)[1:-1]:
        y = scale.y(tick)
        yield f'<line class="grid" x1="{scale.left}" x2="{end}" y1="{y}" y2="{y}"/>'
        yield f'<text class="tick" x="{scale.left - 8}" y="{y + 4}" text-anchor="end">{tick:.4g}</text>'
    middle = (scale.left + end) / 2
    below, speed = scale.height - 14, html.escape(view.speed)
    yield f'<text class="axis" x="{middle}" y="{below}" text-anchor="middle">{speed}</text>'
    turned = f'transform="translate(18 {floor / 2}) rotate(-90)"'
    yield f'<text class="axis" {turned} text-anchor="middle">{html.escape(view.quality)}</text>'


def _svg_stairs(dots: Sequence[_Dot], scale: _Scale) -> str:
    corners: list[str] = []
    height: float | None = None
    for x, y in _staircase(dots):
        if height is not None:
            corners.append(f"{scale.x(x)},{height}")
        height = scale.y(y)
        corners.append(f"{scale.x(x)},{height}")
    return " ".join(corners)


def _svg_dot(dot: _Dot, scale: _Scale) -> Iterator[str]:
    x, y, colour = scale.x(dot.x.value), scale.y(dot.y.value), ROLES[dot.role][0]
    if dot.role != "other":
        (left, right), (low, high) = map(scale.x, dot.x.interval), map(scale.y, dot.y.interval)
        yield f'<path class="band" stroke="{colour}" d="M{left} {y}H{right}M{x} {low}V{high}"/>'
    radius = round(4 + 8 * math.sqrt(dot.area), 1)
    place = f'cx="{x}" cy="{y}" r="{radius}" fill="{colour}"'
    yield f'<circle class="dot {dot.role}" {place} data-trial="{dot.record.number}" tabindex="0"/>'


def _svg_name(dot: _Dot, scale: _Scale, above: int) -> str:
    x, y = scale.x(dot.x.value), scale.y(dot.y.value) - above
    left = x > 0.75 * scale.width
    place = f'x="{x - 6 if left else x + 6}" y="{y}" text-anchor="{"end" if left else "start"}"'
    return f'<text class="name" {place} fill="{ROLES[dot.role][0]}">{html.escape(_label(dot))}</text>'


def _plain(record: TrialRecord, front: Iterable[TrialRecord], choice: Choice, view: View) -> dict[str, Any]:
    return {
        "trial": record.number,
        "role": _role(record, {r.number for r in front}, choice),
        "what": describe(record),
        "digest": record.plan.digest,
        "files": record.artifact_uri,
        "metrics": {
            m.name: {"value": m.value, "low": m.interval[0], "high": m.interval[1], "unit": m.metric.unit}
            for m in record.measurements
        },
        "speed_up": 1 / record.value(view.speed).value,
        "plan": asdict(record.plan),
    }


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>$title</title>
<style>
  body { font: 14px/1.45 system-ui, sans-serif; margin: 16px; color: #1c2733; background: #fff; }
  h1 { font-size: 17px; margin: 0 0 2px; }
  p { margin: 0 0 10px; }
  .legend span { margin-right: 14px; white-space: nowrap; }
  main { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; }
  svg { flex: 1 1 560px; max-width: 1100px; min-width: 0; height: auto; }
  aside { flex: 1 1 260px; max-width: 420px; border: 1px solid #d6dce2; border-radius: 6px; padding: 10px 12px; }
  aside h2 { font-size: 15px; margin: 0 0 6px; }
  table { border-collapse: collapse; width: 100%; }
  td { padding: 1px 8px 1px 0; vertical-align: top; font-variant-numeric: tabular-nums; }
  td:first-child { color: #5b6773; }
  pre { max-height: 240px; overflow: auto; font-size: 12px; background: #f4f6f8; padding: 6px; margin: 8px 0 0; }
  .grid { stroke: #e7ebef; } .tick { font-size: 12px; fill: #5b6773; } .axis { font-size: 14px; fill: #1c2733; }
  .stairs { fill: none; stroke: #1f5fa8; stroke-width: 1.5; opacity: .6; } .band { fill: none; opacity: .45; }
  .name { font-size: 12px; } .dot { stroke: #fff; cursor: pointer; opacity: .85; } .dot.other { opacity: .4; }
  .dot.shown { stroke: #000; stroke-width: 2; opacity: 1; }
</style>
<h1>$title</h1>
<p>Point at a dot to see what was done, click to keep it shown. A dot on the lower edge lies below it.</p>
<p>$reason</p>
<p class="legend">$legend</p>
<main>
<svg viewBox="0 0 $width $height" role="img" aria-label="$title">
$drawing
</svg>
<aside id="card"></aside>
</main>
<script id="trials" type="application/json">$data</script>
<script>
  const trials = JSON.parse(document.getElementById("trials").textContent);
  const card = document.getElementById("card");
  const dots = document.querySelectorAll(".dot");
  let pinned = null;
  function element(tag, text, parent) {
    const made = document.createElement(tag);
    made.textContent = text;
    parent.append(made);
    return made;
  }
  function digits(value) {
    return Number.isInteger(value) ? value.toLocaleString("en") : value.toPrecision(4);
  }
  function show(dot) {
    const trial = trials[dot.dataset.trial];
    card.replaceChildren();
    element("h2", "trial " + trial.trial + (trial.role === "other" ? "" : ", " + trial.role), card);
    element("p", trial.what, card);
    const table = element("table", "", card);
    for (const [name, m] of Object.entries(trial.metrics)) {
      const row = table.insertRow();
      const band = m.low === m.high ? "" : " [" + digits(m.low) + ", " + digits(m.high) + "]";
      element("td", name, row);
      element("td", digits(m.value) + band, row);
    }
    const row = table.insertRow();
    element("td", "speed-up", row);
    element("td", trial.speed_up.toFixed(2) + "x", row);
    element("pre", JSON.stringify(trial.plan.steps, null, 1), card);
    dots.forEach((other) => other.classList.toggle("shown", other === dot));
  }
  dots.forEach((dot) => {
    dot.addEventListener("mouseenter", () => { if (!pinned) show(dot); });
    dot.addEventListener("focus", () => { if (!pinned) show(dot); });
    dot.addEventListener("click", () => { pinned = pinned === dot ? null : dot; show(dot); });
  });
  const champion = document.querySelector(".dot.champion");
  if (champion) show(champion);
</script>
</html>
"""


# -- The heat map

# A layer that is not there any more.
OUT = "#8b949e"


def layers_png(front: Sequence[TrialRecord], layers: Sequence[LayerSpec], path: Path) -> None:
    """Bits and sparsity of every layer (columns) in every front member (rows).

    What a method did to a group of layers stands at the layer that names the group; layers that are out are grey.
    """
    rows = sorted(front, key=lambda r: r.number)
    height = 2.2 + 0.5 * len(rows) + 0.09 * max((len(layer.name) for layer in layers), default=0)
    figure = Figure(figsize=(max(8.0, 2.6 + 0.36 * len(layers)), max(4.5, height)), dpi=100, layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    colours = ListedColormap(["#0b3c6f", "#1f77b4", "#86bbdd", "#eef3f8"]).with_extremes(bad=OUT)
    limits = BoundaryNorm([0, 4.5, 8.5, 16.5, 33], colours.N)
    image = top.imshow(_grid(rows, layers, "bits"), aspect="auto", cmap=colours, norm=limits)
    bar = figure.colorbar(image, ax=top, ticks=[2.2, 6.5, 12.5, 24.7])
    bar.ax.set_yticklabels(["4 or fewer", "8", "16", "32"])
    oranges = colormaps["Oranges"].with_extremes(bad=OUT)
    image = bottom.imshow(100 * _grid(rows, layers, "sparsity"), aspect="auto", cmap=oranges, vmin=0, vmax=100)
    figure.colorbar(image, ax=bottom)
    for axes, title in (
        (top, "bits (grey: the layer was left out)"),
        (bottom, "sparsity, % (a group stands at the layer that names it)"),
    ):
        axes.set_title(title, loc="left", fontsize=12)
        axes.set_yticks(range(len(rows)), [_row_name(r) for r in rows], fontsize=10)
        axes.set_xticks(np.arange(0.5, len(layers)), minor=True)
        axes.set_yticks(np.arange(0.5, len(rows)), minor=True)
        axes.grid(which="minor", color="#c9d1d9", linewidth=0.8)
        axes.tick_params(which="minor", length=0)
    bottom.set_xticks(range(len(layers)), [layer.name for layer in layers], rotation=90, fontsize=10)
    FigureCanvasAgg(figure).print_png(path)


def _row_name(record: TrialRecord) -> str:
    return f"{record.number} · {record.plan.target.runtime} {record.plan.target.precision}"


def _grid(rows: Sequence[TrialRecord], layers: Sequence[LayerSpec], key: str) -> NDArray[np.float64]:
    """`(rows, layers)`: what any method achieved under that key, else the value of an untouched layer; NaN if out."""
    return np.array([[_achieved(r, layer, key) for layer in layers] for r in rows], dtype=np.float64)


def _achieved(record: TrialRecord, layer: LayerSpec, key: str) -> float:
    if any(_is_out(layer.name, achieved) for achieved in record.achieved.values()):
        return math.nan
    untouched: dict[str, Scalar] = {"bits": FULL_BITS.get(record.plan.target.precision, 32), "sparsity": 0.0}
    found = [
        settings[key]
        for method in record.achieved.values()
        for name in (layer.name, layer.tied_to)
        if name is not None and key in (settings := method.get(name, {}))
    ]
    value = found[-1] if found else untouched[key]
    # 32 means "not quantized": it runs at the rest precision.
    return float(untouched[key] if (key, value) == ("bits", 32) else value)


def _is_out(layer: str, achieved: Mapping[str, Settings]) -> bool:
    return any(settings.get("skip") and inside(layer, block) for block, settings in achieved.items())
