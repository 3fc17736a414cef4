"""What follows a search: choose the champion, open the test split for it once, register, draw, and print."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console

from evaluators.evaluation import Examples
from evaluators.measurement import Measurement
from evaluators.runtime import Deployed, Runtime
from search.loop import INTERRUPTED, STOPPED
from search.records import measurement_from
from search.remote import Away
from search.report import draw
from search.select import Bound, Choice, Rule, baselines, choose, front_of
from search.storage import concluding
from search.study import Outcome, Search
from search.table import front_table
from search.tracking import StudyRun, Tracker
from search.trial import TrialRecord
from search.view import View, quality_text

TEST_FILE = "test.json"


@dataclass(frozen=True)
class Conclusion:
    """What the user is shown. `test` has the uncompressed model and the champion that the test split was opened for."""

    outcome: Outcome
    choice: Choice
    view: View
    test: Mapping[str, Measurement]
    link: str
    files: tuple[Path, ...] = ()


def conclude(search: Search, outcome: Outcome) -> Conclusion:
    """Everything after the last trial; safe to repeat."""
    try:
        return _conclude(search, outcome)
    finally:
        with suppress(Away):
            search.tracker.close_study(outcome.study)


def conclude_once(search: Search, outcome: Outcome) -> Conclusion | None:
    """The same for one of many workers: None where others are still at work, or one has concluded these trials."""
    if outcome.others:
        return None
    with concluding(search.storage, search.name, len(outcome.records)) as mine:
        return conclude(search, outcome) if mine else None


def _conclude(search: Search, outcome: Outcome) -> Conclusion:
    choice = choose(outcome.records, search.rule, [m.name for m in search.objectives], search.bounds)
    view = View(search.quality, search.rule.speed)
    tracker = search.tracker
    # An interrupted search has not said its last word: the test split waits.
    test = {} if outcome.ended in (INTERRUPTED, STOPPED) else _test_once(search, outcome, choice.record)
    tracker.register(outcome.study, outcome.front, choice.record, search.workbench.runtimes)
    files = draw(search.folder / search.name, outcome.records, outcome.front, choice, search.layers, view)
    tracker.log_study_files(outcome.study, files)
    return Conclusion(outcome, choice, view, test, tracker.link(outcome.study), tuple(files))


@dataclass(frozen=True)
class Selection:
    """What another choice among recorded trials needs: no model, no data."""

    study: str
    tracker: Tracker
    rule: Rule
    objectives: Sequence[str]
    bounds: Sequence[Bound]
    runtimes: Mapping[str, Runtime]
    quality: str


def reselect(selection: Selection) -> Conclusion:
    """Another champion from what the tracker holds; only the alias moves, and the test split stays closed."""
    tracker = selection.tracker
    study = tracker.study(selection.study)
    records = tuple(tracker.records(study))
    choice = choose(records, selection.rule, selection.objectives, selection.bounds)
    front = tuple(front_of(records, selection.objectives, selection.bounds))
    tracker.register(study, front, choice.record, selection.runtimes)
    outcome = Outcome(study, records, front, "chosen from the recorded trials, nothing was run")
    view = View(selection.quality, selection.rule.speed)
    return Conclusion(outcome, choice, view, _recorded_test(tracker, study, choice.record), tracker.link(study))


def show(conclusion: Conclusion, console: Console) -> None:
    """The front as a table, the champion and why, the test split, and where to look further."""
    outcome, choice = conclusion.outcome, conclusion.choice
    console.print(front_table(outcome.records, outcome.front, choice, conclusion.view))
    lines = [f"champion: trial {choice.record.number}, {choice.reason}"]
    if not choice.met:
        lines.append("nothing meets the rule: this is the nearest")
    lines += [
        f"on the test split, {name}: {m.name} {quality_text(m)}, {m.n} examples" for name, m in conclusion.test.items()
    ]
    lines += surrogate_errors(outcome.front, conclusion.view.quality)
    lines += [f"picture: {path}" for path in conclusion.files if path.suffix == ".png"]
    lines += [outcome.ended, f"more: start ./scripts/ui (or compareto ui) and open {conclusion.link}"]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def surrogate_errors(front: Sequence[TrialRecord], quality: str) -> list[str]:
    """How far the sampler's predictions of latency and size were off, for the front members that it proposed itself."""
    names = dict.fromkeys(name for record in front for name in record.expected if name != quality)
    lines = []
    for name in names:
        told = [r for r in front if name in r.expected]
        errors = [abs(r.expected[name] / r.value(name).value - 1) for r in told]
        lines.append(
            f"{name} as predicted before it was measured: {100 * median(errors):.1f} % off (median), "
            f"{100 * max(errors):.1f} % at most, for {len(told)} of {len(front)} front members"
        )
    return lines


def _test_once(search: Search, outcome: Outcome, champion: TrialRecord) -> Mapping[str, Measurement]:
    """Measure champion and original on the test split, unless that was done before for any champion of this study."""
    if search.tracker.read_study_file(outcome.study, TEST_FILE) is None:
        original = baselines(outcome.records)[0]
        measured = {"champion": _on_test(search, champion), "uncompressed": _on_test(search, original)}
        numbers = {f"test.{name}.{m.name}": m.value for name, m in measured.items()}
        search.tracker.progress(outcome.study, len(outcome.records), numbers)
        text = {
            "number": champion.number,
            "digest": champion.plan.digest,
            "measured": {name: asdict(m) for name, m in measured.items()},
        }
        search.tracker.log_study_text(outcome.study, json.dumps(text, indent=1), TEST_FILE)
    return _recorded_test(search.tracker, outcome.study, champion)


def _recorded_test(tracker: Tracker, study: StudyRun, champion: TrialRecord) -> Mapping[str, Measurement]:
    text = tracker.read_study_file(study, TEST_FILE)
    if text is None:
        return {}
    stored = json.loads(text)
    named = {name: measurement_from(raw) for name, raw in stored["measured"].items()}
    if stored["digest"] != champion.plan.digest:
        # It was opened once, and that was for another one: a second look would be a choice made on it.
        named[f"trial {stored['number']}, an earlier champion"] = named.pop("champion")
    return named


def _on_test(search: Search, record: TrialRecord) -> Measurement:
    bench, target = search.workbench, record.plan.target
    deployed = Deployed(bench.runtimes[target.runtime], search.tracker.model_folder(record), target.precision, ())
    return quality_of(search, deployed, bench.examples("test"))


def quality_of(search: Search, deployed: Deployed, examples: Examples) -> Measurement:
    """What the study's judge says of these files on these examples."""
    (judge,) = (e for e in search.workbench.evaluators.values() if any(m.name == search.quality for m in e.metrics()))
    return next(m for m in judge.measure(deployed, deployed, examples) if m.name == search.quality)
