"""The front as one page without libraries, which tells a trial's plan when its dot is pointed at."""

import html
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import Template

from matplotlib.ticker import MaxNLocator

from search.dots import (
    NAMED,
    ROLES,
    Dot,
    as_json,
    dots_of,
    label_of,
    quality_range,
    speed_range,
    staircase,
    ticks,
)
from search.select import Choice
from search.trial import TrialRecord
from search.view import View


def pareto_html(
    records: Sequence[TrialRecord],
    front: Sequence[TrialRecord],
    choice: Choice,
    path: Path,
    view: View,
) -> None:
    """The same picture as one file without libraries: pointing at a dot shows its plan, a click keeps it shown."""
    dots = dots_of(records, front, choice, view)
    scale = _Scale(dots)
    data = {d.record.number: as_json(d.record, front, choice, view) for d in dots}
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

    def __init__(self, dots: Sequence[Dot]) -> None:
        self.low_x, self.high_x = speed_range(dots)
        self.low_y, self.high_y = quality_range(dots)

    def x(self, value: float) -> float:
        share = math.log(min(max(value, self.low_x), self.high_x) / self.low_x) / math.log(self.high_x / self.low_x)
        return round(self.left + share * (self.width - self.left - self.right), 1)

    def y(self, value: float) -> float:
        share = (min(max(value, self.low_y), self.high_y) - self.low_y) / (self.high_y - self.low_y)
        return round(self.height - self.bottom - share * (self.height - self.top - self.bottom), 1)


def _svg(dots: Sequence[Dot], scale: _Scale, view: View) -> Iterator[str]:
    yield from _svg_axes(scale, view)
    yield f'<polyline class="stairs" points="{_svg_stairs(dots, scale)}"/>'
    for dot in sorted(dots, key=lambda d: ROLES[d.role][2]):
        yield from _svg_dot(dot, scale)
    named = sorted((d for d in dots if d.role in NAMED), key=lambda d: d.x.value)
    for i, dot in enumerate(named):
        yield _svg_name(dot, scale, 14 + 16 * (i % 3))


def _svg_axes(scale: _Scale, view: View) -> Iterator[str]:
    floor, end = scale.height - scale.bottom, scale.width - scale.right
    for tick in ticks(scale.low_x, scale.high_x):
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


def _svg_stairs(dots: Sequence[Dot], scale: _Scale) -> str:
    corners: list[str] = []
    height: float | None = None
    for x, y in staircase(dots):
        if height is not None:
            corners.append(f"{scale.x(x)},{height}")
        height = scale.y(y)
        corners.append(f"{scale.x(x)},{height}")
    return " ".join(corners)


def _svg_dot(dot: Dot, scale: _Scale) -> Iterator[str]:
    x, y, colour = scale.x(dot.x.value), scale.y(dot.y.value), ROLES[dot.role][0]
    if dot.role != "other":
        (left, right), (low, high) = map(scale.x, dot.x.interval), map(scale.y, dot.y.interval)
        yield f'<path class="band" stroke="{colour}" d="M{left} {y}H{right}M{x} {low}V{high}"/>'
    radius = round(4 + 8 * math.sqrt(dot.area), 1)
    place = f'cx="{x}" cy="{y}" r="{radius}" fill="{colour}"'
    yield f'<circle class="dot {dot.role}" {place} data-trial="{dot.record.number}" tabindex="0"/>'


def _svg_name(dot: Dot, scale: _Scale, above: int) -> str:
    x, y = scale.x(dot.x.value), scale.y(dot.y.value) - above
    left = x > 0.75 * scale.width
    place = f'x="{x - 6 if left else x + 6}" y="{y}" text-anchor="{"end" if left else "start"}"'
    return f'<text class="name" {place} fill="{ROLES[dot.role][0]}">{html.escape(label_of(dot))}</text>'


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
