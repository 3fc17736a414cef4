"""The front as a table for the terminal; what it shows is what can be told apart."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich.table import Table

from evaluators.measurement import Measurement
from search.pareto import differ
from search.select import Choice, baselines
from search.trial import TrialRecord
from search.view import View, describe, not_ruined, optional, quality_text, scaled

# Sizes are exact, but few people care about 5 % either way.
SIZE_BAND = 1.05


def front_table(
    records: Sequence[TrialRecord],
    front: Sequence[TrialRecord],
    choice: Choice,
    view: View,
) -> Table:
    """Champion, baselines and what of the front is not ruined and can be told apart, fastest first."""
    table = Table(title="the front (★ champion, ○ uncompressed)", title_justify="left", caption_justify="left")
    counts = ["parameters"] if optional(choice.record, view.parameters) else []
    ratio = view.speed.replace("_", " ")
    for heading in ("trial", "what was done", view.quality, ratio, "speed-up", "ms", "size", *counts):
        table.add_column(
            heading, justify="left" if heading == "what was done" else "right", no_wrap=heading != "what was done"
        )
    near = not_ruined([r.value(view.quality) for r in (*front, choice.record)])
    useful = [r for r in front if r.value(view.quality) in near]
    shown = _told_apart(useful, choice, view)
    rows = {r.number: r for r in (*shown, *baselines(records), choice.record)}
    on_front = {r.number for r in front}
    for record in sorted(rows.values(), key=lambda r: r.value(view.speed).value):
        style = "bold" if record.number == choice.record.number else "" if record.number in on_front else "dim"
        table.add_row(*_cells(record, choice, view), style=style)
    table.caption = "\n".join(_left_out(records, len(useful) - len(shown), len(front) - len(useful)))
    return table


def _told_apart(front: Sequence[TrialRecord], choice: Choice, view: View) -> list[TrialRecord]:
    """Of members alike within their bands, and in size within `SIZE_BAND`, the champion or else the smallest."""
    kept: list[TrialRecord] = []
    for record in sorted(front, key=lambda r: (r.number != choice.record.number, _size(r, view))):
        if all(differ(_looks(record, view), _looks(other, view)) for other in kept):
            kept.append(record)
    return kept


def _looks(record: TrialRecord, view: View) -> list[Measurement]:
    size = optional(record, view.size)
    about = [replace(size, interval=(size.value / SIZE_BAND, size.value * SIZE_BAND))] if size else []
    return [*record.values((view.quality, view.speed)), *about]


def _size(record: TrialRecord, view: View) -> float:
    size = optional(record, view.size)
    return size.value if size else 0.0


def _left_out(records: Sequence[TrialRecord], alike: int, ruined: int) -> Iterator[str]:
    if alike:
        yield f"{alike} more of the front are within the bands of these, see report.json"
    if ruined:
        yield f"{ruined} more of the front lost far more than these, see report.json"
    stopped = sum(r.stopped is not None for r in records)
    if stopped:
        yield f"{stopped} of {len(records)} trials were stopped early, out of reach of the front"


def _cells(record: TrialRecord, choice: Choice, view: View) -> list[str]:
    quality, speed = record.values((view.quality, view.speed))
    mark = "★ " if record.number == choice.record.number else "○ " if not record.plan.steps else ""
    time, size, count = (optional(record, metric) for metric in (view.time, view.size, view.parameters))
    return [
        f"{mark}{record.number}",
        describe(record),
        quality_text(quality),
        f"{speed.value:.3f} [{speed.interval[0]:.3f}, {speed.interval[1]:.3f}]",
        f"{1 / speed.value:.2f}x",
        f"{time.value:.3f}" if time else "",
        scaled(size.value, "B") if size else "",
        *([scaled(count.value)] if count else []),
    ]
