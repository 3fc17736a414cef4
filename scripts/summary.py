"""What the comparison's JSON files say together: hypervolumes, a table and a picture; runs and measures nothing."""

import json
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from compressors.errors import ConfigError
from evaluators.measurement import Measurement, Metric
from search.pareto import distinct, hypervolume

Result = Mapping[str, Any]
"""One run's file, as `contestant.py` writes it."""
Point = tuple[float, float]
"""Latency ratio and quality."""

METRICS = (Metric("quality", "share", "maximize"), Metric("latency_ratio", "of reference", "minimize"))
SEARCHES = ("guided", "tpe", "nsga2", "random", "uniform")
COLOURS = ("#c8102e", "#1f5fa8", "#e07b00", "#6b7680", "#2e8b57", "#8e44ad", "#b8860b", "#17a2b8", "#555555")


@dataclass(frozen=True, slots=True)
class Scale:
    """The quality at which a version is worth nothing, and the ideal one; a latency ratio goes from 1 to 0."""

    worthless: float
    ideal: float

    def hypervolume(self, points: Iterable[Point]) -> float:
        """Normalised: 1 for a version at ideal quality in no time, 0 where nothing beats the reference point."""
        width = self.ideal - self.worthless
        return hypervolume([(ratio, (self.ideal - quality) / width) for ratio, quality in points], (1.0, 1.0))


def with_hypervolumes(result: Result) -> dict[str, Any]:
    """The result with what follows from its points filled in: all hypervolumes.

    On validation after each trial, and on test for the versions that were chosen on validation; their latencies are
    those of the second reading where there is one. And how many distinct points the validation front has.
    """
    validation, test = Scale(*result["scale"]["validation"]), Scale(*result["scale"]["test"])
    seen: list[Point] = []
    trials = []
    for trial in result["trials"]:
        seen += [_point(trial, "quality")] if trial["reason"] is None else []
        trials.append({**trial, "hypervolume": round(validation.hypervolume(seen), 6)})
    chosen = [_point(member, "test") for member in result["front"] if member["chosen"]]
    return {
        **result,
        "trials": trials,
        "distinct": len(distinct([_bands(m) for m in result["front"] if m["quality"][0] >= validation.worthless])),
        "validation_hypervolume": round(validation.hypervolume(seen), 6),
        "test_hypervolume": round(test.hypervolume(chosen), 6),
    }


def _bands(member: Mapping[str, Any]) -> list[Measurement]:
    return [Measurement(m, row[0], (row[1], row[2]), 1, {}) for m in METRICS for row in [member[m.name]]]


def first_to_reach(result: Result, target: float) -> int | None:
    """After how many trials its validation hypervolume is at least `target`; None if never."""
    reached = (i for i, trial in enumerate(result["trials"], 1) if trial["hypervolume"] >= target)
    return next(reached, None)


def save(result: Result, path: Path) -> None:
    """As JSON, a list of numbers to a line; all of it or nothing."""
    text = json.dumps(result, indent=1)
    part = path.with_suffix(".part")
    part.write_text(re.sub(r"\[[\s\d.,e+-]+\]", lambda found: " ".join(found[0].split()), text) + "\n")
    part.replace(path)


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Method -> its results by seed, the searches first."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*-*.json"))]
    methods = sorted({r["method"] for r in results}, key=lambda m: (m not in SEARCHES, *_place(m)))
    return {m: sorted((r for r in results if r["method"] == m), key=lambda r: int(r["seed"])) for m in methods}


def summarise(folder: Path) -> list[Path]:
    """Write `summary.md` and `hypervolume.png` beside the results of one workload and batch size."""
    results = read(folder)
    _check_networks(folder, [run for runs in results.values() for run in runs])
    text, picture = folder / "summary.md", folder / "hypervolume.png"
    text.write_text("\n".join(_lines(folder.name, results)) + "\n")
    draw(results, picture)
    return [text, picture]


def _check_networks(folder: Path, runs: Sequence[Result]) -> None:
    """All methods of a seed must have started from the same weights."""
    for seed in {run["seed"] for run in runs}:
        networks = {run["method"]: run["network"] for run in runs if run["seed"] == seed}
        if len(set(networks.values())) > 1:
            remedy = "run the odd ones again, with the same COMPARETO_CACHE"
            raise ConfigError(str(folder), f"seed {seed} started from several networks: {networks}", remedy)


# -- The table


def _lines(name: str, results: Mapping[str, Sequence[Result]]) -> Iterator[str]:
    yield f"# {name}: normalised hypervolume over (latency ratio, quality), mean [least, most] over the seeds"
    yield ""
    yield "| method | seeds | test | validation | distinct points | trials | wall s | CPU s |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for method, runs in results.items():
        yield f"| {method} | {', '.join(str(r['seed']) for r in runs)} | " + " | ".join(_cells(runs)) + " |"
    yield ""
    yield from _notes(results)
    yield from _reaching(results)


def _cells(runs: Sequence[Result]) -> list[str]:
    return [
        _spread([r["test_hypervolume"] for r in runs], 3),
        _spread([r["validation_hypervolume"] for r in runs], 3),
        _spread([r["distinct"] for r in runs], 1),
        _spread([len(r["trials"]) for r in runs], 0),
        _spread([r["seconds"]["wall"] for r in runs], 0),
        _spread([r["seconds"]["cpu"] for r in runs], 0),
    ]


def _spread(values: Sequence[float], digits: int) -> str:
    low, high = min(values), max(values)
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if low == high else f"{mean} [{low:.{digits}f}, {high:.{digits}f}]"


def _notes(results: Mapping[str, Sequence[Result]]) -> Iterator[str]:
    for method, runs in results.items():
        again = sum(all(m["again"] for m in r["front"]) for r in runs)
        if again < len(runs):
            yield f"- {method}: latencies of {len(runs) - again} of {len(runs)} runs are as read during the runs."
        for run in runs:
            if run["error"]:
                yield f"- {method}, seed {run['seed']}: {run['error']}"


def _reaching(results: Mapping[str, Sequence[Result]]) -> Iterator[str]:
    """How soon the guided search is where each other search ends, seed by seed."""
    guided = {r["seed"]: r for r in results.get("guided", ())}
    for method in SEARCHES:
        pairs = [(guided[r["seed"]], r) for r in results.get(method, ()) if r["seed"] in guided and method != "guided"]
        if pairs:
            found = [first_to_reach(own, other["validation_hypervolume"]) for own, other in pairs]
            after = ", ".join("never" if n is None else str(n) for n in found)
            yield f"- guided reaches the final validation hypervolume of {method} at trial (by seed): {after}."


def _point(row: Mapping[str, Any], quality: str) -> Point:
    latency = row.get("again") or row["latency_ratio"]
    return float(latency[0]), float(row[quality][0])


def _place(method: str) -> tuple[int, str]:
    return (SEARCHES.index(method) if method in SEARCHES else len(SEARCHES), method)


# -- The picture


def draw(results: Mapping[str, Sequence[Result]], path: Path) -> None:
    """Validation hypervolume against seconds and against trials: line = mean over the seeds, area = least to most."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    by_seconds, by_trials = figure.subplots(1, 2, sharey=True)
    searches = {method: runs for method, runs in results.items() if method in SEARCHES}
    colours = dict(zip(results, COLOURS, strict=False))
    _curves(by_seconds, {m: [_over_seconds(r) for r in runs] for m, runs in results.items()}, colours)
    _curves(by_trials, {m: [_over_trials(r) for r in runs] for m, runs in searches.items()}, colours)
    _frame(by_seconds, "seconds since the start of the process")
    _frame(by_trials, "trials")
    by_seconds.set_ylabel("normalised hypervolume on validation")
    handles, labels = by_seconds.get_legend_handles_labels()
    title = "mean, least to most"
    figure.legend(handles, labels, loc="outside right center", frameon=False, title=title)
    figure.savefig(path, dpi=110)


Steps = tuple[list[float], list[float]]
"""Where a staircase rises, and to what."""


def _over_seconds(result: Result) -> Steps:
    rows = sorted((trial["elapsed_s"], trial["hypervolume"]) for trial in result["trials"])
    return [s for s, _ in rows], [h for _, h in rows]


def _over_trials(result: Result) -> Steps:
    heights = [trial["hypervolume"] for trial in result["trials"]]
    return [float(i) for i in range(1, len(heights) + 1)], heights


def _curves(axes: Any, methods: Mapping[str, Sequence[Steps]], colours: Mapping[str, str]) -> None:
    """To one right end: a run that ended early keeps its last height, because it has nothing more to give."""
    end = max((x for runs in methods.values() for xs, _ in runs for x in xs), default=1.0)
    for method, runs in methods.items():
        places = sorted({end, *(x for xs, _ in runs for x in xs)})
        heights = np.array([_heights(run, places) for run in runs])
        style, colour = "-" if method in SEARCHES else "--", colours[method]
        axes.step(places, heights.mean(axis=0), style, where="post", color=colour, label=method, linewidth=1.6)
        axes.fill_between(places, heights.min(axis=0), heights.max(axis=0), step="post", color=colour, alpha=0.12, lw=0)


def _heights(run: Steps, places: Sequence[float]) -> list[float]:
    xs, ys = run
    rises = np.searchsorted(xs, places, side="right")
    return [ys[i - 1] if i else 0.0 for i in rises]


def _frame(axes: Any, name: str) -> None:
    axes.set_xscale("log")
    axes.set_xlabel(name)
    axes.set_ylim(0, 1)
    axes.grid(True, color="#e3e6e9", linewidth=0.7)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
