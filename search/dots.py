"""The measured trials as dots of a picture, with roles and the ranges worth showing; draws nothing."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evaluators.measurement import Measurement
from search.select import Choice
from search.trial import TrialRecord
from search.view import View, describe, not_ruined, optional

BLUE, ORANGE, RED, GREY = "#1f5fa8", "#e07b00", "#c8102e", "#9aa3ad"
ROLES = {
    "other": (GREY, "other trials", 1),
    "front": (BLUE, "on the front (area: size)", 3),
    "baseline": (ORANGE, "uncompressed", 4),
    "champion": (RED, "champion", 5),
}
NAMED = ("baseline", "champion")


@dataclass(frozen=True)
class Dot:
    """One measured trial as both pictures show it; `x` is speed, `y` is quality, `area` in 0..1 is size."""

    record: TrialRecord
    role: str
    x: Measurement
    y: Measurement
    area: float


def dots_of(records: Iterable[TrialRecord], front: Iterable[TrialRecord], choice: Choice, view: View) -> list[Dot]:
    """Of all trials that were measured to the end."""
    measured = [r for r in records if r.measured]
    on_front = {r.number for r in front}
    sizes = {r.number: m.value for r in measured if (m := optional(r, view.size))}
    largest = max(sizes.values(), default=1.0)
    return [
        Dot(
            record=r,
            role=role_of(r, on_front, choice),
            x=r.value(view.speed),
            y=r.value(view.quality),
            area=sizes.get(r.number, largest) / largest,
        )
        for r in measured
    ]


def role_of(record: TrialRecord, on_front: set[int], choice: Choice) -> str:
    """One of `ROLES`."""
    if record.number == choice.record.number:
        return "champion"
    if not record.plan.steps:
        return "baseline"
    return "front" if record.number in on_front else "other"


def label_of(dot: Dot) -> str:
    """Its name in a picture."""
    target = dot.record.plan.target
    return f"{target.runtime} {target.precision}" if dot.role == "baseline" else f"trial {dot.record.number}"


def staircase(dots: Iterable[Dot]) -> list[tuple[float, float]]:
    """The best quality that can be had at each speed, from fast to slow."""
    steps: list[Dot] = []
    for dot in sorted(dots, key=lambda d: d.x.value):
        if not steps or (dot.y.no_worse(steps[-1].y) and dot.y.value != steps[-1].y.value):
            steps.append(dot)
    return [(d.x.value, d.y.value) for d in steps]


def speed_range(dots: Sequence[Dot]) -> tuple[float, float]:
    """All whose quality is shown, with room beside: a ruined candidate is often by far the fastest."""
    low, high = quality_range(dots)
    xs = [d.x.value for d in dots if low <= d.y.value <= high]
    return min(xs) / 1.25, max(xs) * 1.25


def quality_range(dots: Sequence[Dot]) -> tuple[float, float]:
    """Room for what matters and its bands; a ruined candidate must not squeeze the rest into a line."""
    near = not_ruined([d.y for d in dots if d.role != "other"])
    low, high = min(m.interval[0] for m in near), max(m.interval[1] for m in near)
    room = 0.06 * (high - low) or 0.01
    return low - room, high + room


def ticks(low: float, high: float) -> list[float]:
    """Round values of a logarithmic axis: 1, 2, 5 and their neighbours, up to a dozen."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [d * 10.0**p for p in powers for d in (1, 1.5, 2, 3, 4, 5, 7)]
    coarse = [d * 10.0**p for p in powers for d in (1, 2, 5)]
    within = [t for t in fine if low <= t <= high]
    return within if len(within) <= 12 else [t for t in coarse if low <= t <= high]


def as_json(record: TrialRecord, front: Iterable[TrialRecord], choice: Choice, view: View) -> dict[str, Any]:
    """All that is told of a trial, in values that JSON knows."""
    return {
        "trial": record.number,
        "role": role_of(record, {r.number for r in front}, choice),
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
