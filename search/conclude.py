"""What follows a search: choose the champion, open the test split for it once, register, draw, and print."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from evaluators.measurement import Measurement, Metric
from evaluators.runtime import Deployed
from search import report
from search.select import Choice, baselines, choose
from search.study import Outcome, Search
from search.tracking import StudyRun
from search.trial import Clock, TrialRecord

TEST_FILE = "test.json"


@dataclass(frozen=True)
class Conclusion:
    """What the user is shown: the front, the champion, and how both the champion and its input do on the test split.

    `test` is empty for a metric that needs no examples, or when the test split was opened for another champion before.
    """

    outcome: Outcome
    choice: Choice
    objectives: tuple[str, ...]
    test: Mapping[str, Measurement]
    link: str
    folder: Path


def conclude(search: Search, outcome: Outcome) -> Conclusion:
    """Everything after the last trial; safe to repeat."""
    names = tuple(metric.name for metric in search.objectives)
    choice = choose(outcome.records, search.rule, names, search.bounds)
    test = _test_once(search, outcome.study, choice.record)
    tracker = search.tracker
    tracker.register(outcome.study, outcome.front, choice.record, search.workbench.runtimes)
    folder = search.folder / search.name
    tracker.log_study_files(outcome.study, report.draw(folder, outcome.records, outcome.front, choice, search.layers))
    tracker.close_study(outcome.study)
    return Conclusion(outcome, choice, names, test, tracker.link(outcome.study), folder)


def show(conclusion: Conclusion, console: Console) -> None:
    """The front as a table, the champion and why, the test split, and where to look further."""
    outcome, choice = conclusion.outcome, conclusion.choice
    console.print(report.front_table(outcome.records, outcome.front, choice, conclusion.objectives))
    console.print(f"[bold]champion:[/] trial {choice.record.number}, {choice.reason}", highlight=False)
    if not choice.met:
        console.print("[bold yellow]no point meets the rule; this is the nearest[/]")
    for name, measured in conclusion.test.items():
        low, high = measured.interval
        console.print(
            f"test split, {name}: {measured.metric.name} {measured.value:.4f} [{low:.4f}, {high:.4f}], n = {measured.n}",
            highlight=False,
        )
    console.print(f"{outcome.ended}; files in {conclusion.folder}", highlight=False, soft_wrap=True)
    console.print(f"MLflow: compareto ui, then {conclusion.link}", highlight=False, soft_wrap=True)


def _test_once(search: Search, study: StudyRun, champion: TrialRecord) -> dict[str, Measurement]:
    """Measure champion and original on the test split, unless that was done before: then only its record is read."""
    text = search.tracker.read_study_file(study, TEST_FILE)
    if text is None:
        text = _measure_test(search, champion)
        search.tracker.log_study_text(study, text, TEST_FILE)
    stored = json.loads(text)
    if stored["digest"] != champion.plan.digest:
        return {}
    return {name: _measurement(raw) for name, raw in stored["measurements"].items()}


def _measure_test(search: Search, champion: TrialRecord) -> str:
    bench = search.workbench
    examples = bench.examples("test")
    measurements: dict[str, Measurement] = {}
    original = baselines(search.tracker_records())[0]
    for name, record in (("champion", champion), ("uncompressed", original)):
        runtime = bench.runtimes[record.plan.target.runtime]
        deployed = Deployed(runtime, search.tracker.model_folder(record), record.plan.target.precision, ())
        for evaluator in bench.evaluators.values():
            if any(metric.name == search.quality for metric in evaluator.metrics()):
                measurements[name] = evaluator.measure(deployed, deployed, examples)[0]
    return json.dumps(
        {"digest": champion.plan.digest, "measurements": {name: asdict(m) for name, m in measurements.items()}},
        indent=1,
    )


def _measurement(raw: Mapping[str, object]) -> Measurement:
    fields = dict(raw)
    return Measurement(Metric(**fields.pop("metric")), interval=tuple(fields.pop("interval")), **fields)  # type: ignore[arg-type]


__all__ = ["Clock", "Conclusion", "conclude", "show"]
