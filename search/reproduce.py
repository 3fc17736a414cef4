"""Rebuilds a trial from its plan alone, without any cache, and holds it against what was recorded."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from evaluators.measurement import Measurement
from evaluators.runtime import Deployed
from search.study import Search
from search.trial import Clock, TrialRecord


@dataclass(frozen=True)
class Reproduction:
    """`pairs` holds each metric as recorded and as rebuilt; predictions are compared on the validation split."""

    record: TrialRecord
    pairs: tuple[tuple[Measurement, Measurement], ...]
    same_files: bool
    same_predictions: float
    largest_difference: float

    @property
    def holds(self) -> bool:
        """Whether no metric got clearly worse or clearly better."""
        return not any(a.clearly_better(b) or b.clearly_better(a) for a, b in self.pairs)


def reproduce(search: Search, record: TrialRecord, watch: Callable[[str], None]) -> Reproduction:
    """Compress, recover, deploy and measure again in an empty folder; raises `Infeasible` if that no longer works."""
    recorded = Deployed(
        search.workbench.runtimes[record.plan.target.runtime],
        search.tracker.model_folder(record),
        record.plan.target.precision,
        (),
    )
    with tempfile.TemporaryDirectory() as scratch:
        bench = replace(search.workbench, store=None, cache=Path(scratch) / "cache")
        examples, clock = bench.examples("validation"), Clock(watch=watch)
        reference = bench.reference(search.reference, clock)
        try:
            _, rebuilt = bench.realise(record.plan, _empty(Path(scratch) / "rebuilt"), clock)
            measured = bench.measure(rebuilt, reference, examples, clock)
            before, after = recorded.run(*examples.inputs), rebuilt.run(*examples.inputs)
        finally:
            bench.close()
        return Reproduction(
            record=record,
            pairs=tuple((record.value(m.name), m) for m in measured),
            same_files=recorded.sha256 == rebuilt.sha256,
            same_predictions=float((before.argmax(-1) == after.argmax(-1)).mean()),
            largest_difference=float(np.abs(before - after).max()),
        )


def show(found: Reproduction, console: Console) -> None:
    """One row a metric: recorded, rebuilt, and whether the bands touch."""
    table = Table(title=f"trial {found.record.number}, rebuilt from its plan", title_justify="left")
    for column in ("metric", "recorded", "rebuilt", "verdict"):
        table.add_column(column)
    for recorded, rebuilt in found.pairs:
        apart = recorded.clearly_better(rebuilt) or rebuilt.clearly_better(recorded)
        table.add_row(recorded.name, _text(recorded), _text(rebuilt), "differs" if apart else "same within bands")
    console.print(table)
    files = "identical" if found.same_files else "not identical"
    console.print(
        f"deployed files {files}; {100 * found.same_predictions:.1f} % equal predictions, "
        f"outputs differ by at most {found.largest_difference:.3g}",
        highlight=False,
    )


def _text(measurement: Measurement) -> str:
    low, high = measurement.interval
    return f"{measurement.value:.5g} [{low:.5g}, {high:.5g}]"


def _empty(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
